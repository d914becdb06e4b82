"""The dtypes that a checkpoint holds, by name: one list for whoever writes, reads or shows it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Not: objects, strings, records, dates, long doubles, and what has no arithmetic yet.
DTYPES = frozenset(
    (
        "bool", "int2", "int4", "int8", "int16", "int32", "int64",
        "uint2", "uint4", "uint8", "uint16", "uint32", "uint64",
        "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
        "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
        "bfloat16", "float16", "float32", "float64", "complex64", "complex128",
    )
)  # fmt: skip

# What PRNG keys are made of, and how many of them a key is, of the generators that JAX has.
KEY_BITS = np.dtype(np.uint32)
KEY_SHAPES = {"key<threefry2x32>": (2,), "key<rbg>": (4,), "key<unsafe_rbg>": (4,)}


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def name_of_key(impl: object) -> str:
    return f"key<{impl!s}>"


def names_key(name: str) -> bool:
    """Whether `name` is that of PRNG keys, of whatever generator."""
    return name.startswith("key<") and name.endswith(">")


def dtype_of(name: str) -> np.dtype:
    """One of `DTYPES`."""
    return jnp.dtype(name)


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """What it is in the file: `.npy` does not know bfloat16 and its kin."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.isbuiltin == 2 else dtype
