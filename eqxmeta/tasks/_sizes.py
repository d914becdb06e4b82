"""Sizes of tasks that are not all alike: drawn for each, in arrays of the largest."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from .._arguments import check_argument, check_int

# A number, or the least and the most.
Size: TypeAlias = int | tuple[int, int]


def checked_size(value: Any, argument: str, what: str) -> Size:
    if not isinstance(value, tuple | list):
        return check_int(value, argument, minimum=1, what=f"{what}, or a pair (least, most)")
    expected = f"a pair (least, most) of {what}, or an integer"
    fault = "is not a range"
    check_argument(len(value) == 2, value, argument, expected, ValueError, fault)
    least, most = (check_int(x, argument, minimum=1, what=what) for x in value)
    check_argument(least <= most, value, argument, expected, ValueError, fault)
    return least, most


def most(size: Size) -> int:
    return size if isinstance(size, int) else size[1]


def draw_size(key: PRNGKeyArray, size: Size) -> int | Int[Array, ""]:
    """Uniformly, both ends included."""
    if isinstance(size, int):
        return size
    least, most = size
    return jax.random.randint(key, (), least, most + 1, dtype=jnp.int32)


def with_padding(
    batch: tuple[Shaped[Array, "n ..."], Int[Array, " n"]],
    most_ways: int,
    ways: int | Int[Array, ""],
    count: int | Int[Array, ""],
) -> tuple[Shaped[Array, "n ..."], Int[Array, " n"], Float[Array, " n"]]:
    """`(x, y, weight)` of a batch that lies class by class: the first `count` examples of each of
    the first `ways` classes; zeros for all others."""
    x, y = batch
    row, column = jnp.divmod(jnp.arange(y.shape[0]), y.shape[0] // most_ways)
    exists = (row < ways) & (column < count)
    x = jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
    return x, jnp.where(exists, y, 0), exists.astype(float)
