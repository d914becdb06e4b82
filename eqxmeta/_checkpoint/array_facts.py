"""What is in an array, as a line of text that can be compared."""

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The numbers of an array are told one by one up to so many.
_FEW = 8

_BLOCK = 1 << 18  # numbers of an array that are looked at together: 2 MB as float64

_PERIOD = 262_139  # of the weights by place, a prime: no size of an image divides it

_FLOATS = re.compile(r"(.+\]) (of|about) (.+)")


def agree(old: str, new: str) -> bool:
    """Whether two facts are the same. Floating-point data may have been computed by another
    processor or library, and differ in its last bits."""
    a, b = _FLOATS.fullmatch(old), _FLOATS.fullmatch(new)
    if old == new or a is None or b is None or a.groups()[:2] != b.groups()[:2]:
        return old == new
    try:
        x, y = ([float(number) for number in re.split(", | ± | in order ", m[3])] for m in (a, b))
    except ValueError:  # of a file that says what we never wrote
        return False
    if len(x) != len(y) or (a[2] != "of" and len(x) < 3):
        return False
    if a[2] == "of":
        relative, near = 1e-5, 1e-6 * max((abs(n) for n in (*x, *y) if math.isfinite(n)), default=0)
    else:
        relative, near = 1e-3, 1e-3 * max(x[1], y[1]) + 1e-9 * max(abs(x[0]), abs(y[0]))
    return all(
        str(u) == str(v) or math.isclose(u, v, rel_tol=relative, abs_tol=near)
        for u, v in zip(x, y, strict=True)
    )


def array_fact(x: Any) -> str:
    """Shape, dtype, and of the numbers: all, if they are few; a digest; or, of floating-point data,
    mean, deviation and a figure of their order."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    kind = f"{x.dtype}{list(x.shape)}"
    if x.dtype.hasobject or not getattr(x, "is_fully_addressable", True):
        return kind
    x = np.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        if 0 < x.size <= _FEW and not np.iscomplexobj(x):
            return f"{kind} of {', '.join(map(str, x.ravel()))}"
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation, order = _moments(x)
        return f"{kind} about {mean:.6g} ± {deviation:.6g} in order {order:.6g}"
    digest = hashlib.sha256()
    for block in _blocks(x):
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return f"{kind} {digest.hexdigest()[:16]}"


def _moments(x: np.ndarray) -> tuple[float, float, float]:
    """Of what is finite in `x`, block by block: mean and deviation (Chan, Golub and LeVeque 1983,
    updating formula), and a mean, weighted by place, of how far the numbers are from their mean,
    which is another one for the same numbers in another order."""
    count, mean, squares, place, weighted, weights = 0, 0.0, 0.0, 0, 0.0, 0.0
    of_places = np.cos(np.arange(min(x.size, _PERIOD + _BLOCK)) % _PERIOD)
    for block in _blocks(x):
        numbers = (np.abs(block) if np.iscomplexobj(block) else block).astype(np.float64)
        weight = of_places[place % _PERIOD :][: numbers.size]
        place += numbers.size
        finite = np.isfinite(numbers)
        if not finite.all():
            numbers, weight = numbers[finite], weight[finite]
        new = numbers.size
        if new:
            apart = float(numbers.mean()) - mean
            count += new
            mean += apart * new / count
            squares += float(numbers.var()) * new + apart * apart * new * (count - new) / count
            weighted += float(np.einsum("i,i", weight, numbers))  # not by BLAS and its threads
            weights += float(weight.sum())
    count = max(count, 1)
    return mean, math.sqrt(squares / count), (weighted - weights * mean) / math.sqrt(count)


def _blocks(x: np.ndarray) -> Iterable[Any]:
    """All of `x` in the order of its indices, in flat pieces: a copy of it all may be large."""
    options = {"order": "C", "buffersize": _BLOCK}
    return np.nditer(x, ["external_loop", "buffered", "zerosize_ok"], **options)
