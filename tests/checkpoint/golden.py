"""What the files `data/jax-*.ckpt` hold: `python -m tests.checkpoint.golden PATH` writes one.

They were written under the jax versions that their names tell, and must load under every one.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

import eqxmeta as em

# Every dtype that NumPy or ml_dtypes have and JAX can hold, by name.
DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
    "float32", "float64", "complex64", "complex128", "bfloat16", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4", "uint2", "uint4",
)  # fmt: skip


def array(dtype: str) -> np.ndarray:
    """`[2, 3]` of ones and zeros, or of powers of two where there is no zero."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.array([[1, 0, 1], [0, 1, 1]]).astype(kind)


def tree(value: float = 1.5):
    """The state of a run, every dtype, and keys; the arrays that are learnt are `value`."""
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    filled = jax.tree.map(lambda x: jnp.full(x.shape, value), eqx.filter(linear, eqx.is_array))
    model = eqx.combine(filled, linear)
    moments = optax.adam(1e-3).init(eqx.filter(model, eqx.is_array))
    return {
        "state": em.TrainState(jnp.int32(7), model, moments),
        "dtypes": {name: array(name) for name in DTYPES},
        "keys": [jax.random.key(3), jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3)],
        "split": jax.random.split(jax.random.key(4), 2),
    }


if __name__ == "__main__":
    em.save(sys.argv[1], tree(), meta={"jax": jax.__version__, "step": 7})
