"""What a model or a task source is, in plain text that reads the same in every process: by which a
resumed run knows its own."""

import dataclasses
import enum
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# A container of more is told by a digest of them all.
_MANY = 50


def fingerprint(tree: PyTree, *, values: bool) -> dict[str, str]:
    """By key path, what in `tree` can be named: the classes of its parts, its plain values, and its
    functions, which are told by their names alone.

    `values`: of an array shape, dtype and a digest of its bytes; else nothing, for the arrays of a
    model are what is trained.
    """
    return dict(_facts(tree, "", values, ()))


def _facts(x: Any, path: str, values: bool, above: tuple[int, ...]) -> Iterable[tuple[str, str]]:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        if values:
            yield path, _array(x)
        return
    parts = None if id(x) in above else _parts(x)
    if parts is None:
        yield path, _plain(x)
        return
    yield path, type(x).__name__
    inside = [
        fact
        for name, part in parts.items()
        for fact in _facts(part, f"{path}{name}", values, (*above, id(x)))
    ]
    if len(parts) > _MANY:
        yield f"{path}[...]", hashlib.sha256(repr(inside).encode()).hexdigest()[:16]
    else:
        yield from inside


def _parts(x: Any) -> dict[str, Any] | None:
    """What `x` is made of, by the end of a key path; `None` if it is one thing."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):  # as every Equinox module is
        names = [field.name for field in dataclasses.fields(x)]
        return {f".{name}": getattr(x, name) for name in names if hasattr(x, name)}
    if isinstance(x, functools.partial):
        return {".func": x.func, ".args": x.args, ".keywords": x.keywords}
    if inspect.ismethod(x):
        return {".__func__": x.__func__, ".__self__": x.__self__}
    if isinstance(x, Mapping):
        return {f"[{key!r}]": x[key] for key in x}
    if isinstance(x, tuple | list):
        return {f"[{index}]": part for index, part in enumerate(x)}
    return None


def _plain(x: Any) -> str:
    if x is None or isinstance(
        x, bool | int | float | complex | str | bytes | np.dtype | enum.Enum
    ):
        return repr(x)
    if isinstance(x, set | frozenset):  # whose order is another in every process
        return f"{{{', '.join(sorted(map(_plain, x)))}}}"
    # Of a function, also of one that JAX has wrapped, and of a class; else that of its class, for
    # what an object prints of itself may be where in memory it is.
    named = inspect.unwrap(x) if callable(x) else x
    name = getattr(named, "__qualname__", None) or getattr(named, "__name__", None)
    return name if isinstance(name, str) else type(x).__qualname__


def _array(x: Any) -> str:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    kind = f"{x.dtype}{list(x.shape)}"
    if x.dtype == object or not getattr(x, "is_fully_addressable", True):
        return kind
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    return f"{kind} {hashlib.sha256(data).hexdigest()[:16]}"
