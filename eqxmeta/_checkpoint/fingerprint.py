"""What a model or a task source is, in plain text that reads the same in every process: by which a
resumed run knows its own."""

import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# Of more plain values than these, such as the names of files, a digest is enough.
_MANY = 50

_BLOCK = 1 << 18  # numbers of an array that are looked at together: 2 MB as float64

_ABOUT = re.compile(r"(.+) about (\S+) ± (\S+)")


def fingerprint(tree: PyTree, *, values: bool) -> dict[str, str]:
    """By key path, what in `tree` can be named: the classes of its parts, its plain values, and its
    functions, which are told by their names alone.

    `values`: of an array also shape, dtype and what is in it; else nothing, for the arrays of a
    model are what is trained.
    """
    return dict(_facts(tree, "", values, ()))


def agree(old: str, new: str) -> bool:
    """Whether two facts are the same. Floating-point data may have been computed by another
    processor or library, and differ in its last bits."""
    if old == new:  # a spread too large for a float is NaN, which equals nothing
        return True
    a, b = _ABOUT.fullmatch(old), _ABOUT.fullmatch(new)
    if a is None or b is None or a[1] != b[1]:
        return False
    near = 1e-3 * max(float(a[3]), float(b[3]))
    return all(math.isclose(float(a[i]), float(b[i]), rel_tol=1e-3, abs_tol=near) for i in (2, 3))


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
    if len(parts) > _MANY and all(_is_plain(part) for part in parts.values()):
        told = sorted((name, _plain(part)) for name, part in parts.items())
        yield f"{path}[...]", hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        return
    for name, part in parts.items():
        yield from _facts(part, f"{path}{name}", values, (*above, id(x)))


def _is_plain(x: Any) -> bool:
    return not isinstance(x, jax.Array | np.ndarray | np.generic) and _parts(x) is None


def _parts(x: Any) -> dict[str, Any] | None:
    """What `x` is made of, by the end of a key path; `None` if it is one thing."""
    if callable(x) and hasattr(x, "__wrapped__"):
        return None  # a function that JAX or Equinox has wrapped, in ways of their own
    if dataclasses.is_dataclass(x) and not isinstance(x, type):  # as every Equinox module is
        names = [field.name for field in dataclasses.fields(x)]
        return {f".{name}": getattr(x, name) for name in names if hasattr(x, name)}
    if isinstance(x, functools.partial):
        return {".func": x.func, ".args": x.args, ".keywords": x.keywords}
    if inspect.ismethod(x):
        return {".__func__": x.__func__, ".__self__": x.__self__}
    if isinstance(x, Mapping):
        return {f"[{_plain(key)}]": x[key] for key in x}
    if isinstance(x, tuple | list):
        return {f"[{index}]": part for index, part in enumerate(x)}
    return None


def _plain(x: Any) -> str:
    if isinstance(x, enum.Enum):  # whose value may be anything
        return f"{type(x).__qualname__}.{x.name}"
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | np.dtype):
        return repr(x)
    if isinstance(x, set | frozenset):  # whose order is another in every process
        return f"{{{', '.join(sorted(map(_plain, x)))}}}"
    # Of a function and a class; else that of its class, for what an object prints of itself may be
    # where in memory it is.
    for named in (x, getattr(x, "__wrapped__", None)):
        name = getattr(named, "__qualname__", None) or getattr(named, "__name__", None)
        if isinstance(name, str):
            return name
    return type(x).__qualname__


def _array(x: Any) -> str:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    kind = f"{x.dtype}{list(x.shape)}"
    if x.dtype.hasobject or not getattr(x, "is_fully_addressable", True):
        return kind
    x = np.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = _mean_and_deviation(x)
        return f"{kind} about {mean:.6g} ± {deviation:.6g}"
    digest = hashlib.sha256()
    for block in _blocks(x):
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return f"{kind} {digest.hexdigest()[:16]}"


def _mean_and_deviation(x: np.ndarray) -> tuple[float, float]:
    """Of what is finite in `x`, block by block (Chan, Golub and LeVeque 1983, updating formula)."""
    count, mean, squares = 0, 0.0, 0.0
    for block in _blocks(x):
        numbers = (np.abs(block) if np.iscomplexobj(block) else block).astype(np.float64)
        numbers = numbers[np.isfinite(numbers)]
        new = numbers.size
        if new:
            apart = float(numbers.mean()) - mean
            count += new
            mean += apart * new / count
            squares += float(numbers.var()) * new + apart * apart * new * (count - new) / count
    return mean, math.sqrt(squares / max(count, 1))


def _blocks(x: np.ndarray) -> Iterable[Any]:
    """All of `x` in the order of its indices, in flat pieces: a copy of it all may be large."""
    options = {"order": "C", "buffersize": _BLOCK}
    return np.nditer(x, ["external_loop", "buffered", "zerosize_ok"], **options)
