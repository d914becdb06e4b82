"""The loop over inner steps, of which those in between may be remembered or computed again."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._keys import keys_as_data


def scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    steps: int,
    remat: bool | int,
) -> tuple[PyTree, PyTree]:
    """`lax.scan(step, carry, xs)` of `steps` steps, with the first one outside of the loop.

    Before it all tasks have the same weights, which under `vmap` therefore have no task axis: the
    forward pass is one product of the shared weights with the examples of all tasks. A loop's
    carry would have that axis from the start.
    """
    if steps == 0:
        return jax.lax.scan(step, carry, xs, length=0)
    xs, with_keys = keys_as_data(xs)

    def one(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return step(carry, with_keys(x))

    carry, first = one(carry, jax.tree.map(lambda x: x[0], xs))
    parts = [jax.tree.map(lambda y: y[None], first)]
    rest = steps - 1
    length = rest if remat is False else math.isqrt(rest) if remat is True else min(remat, rest)
    whole = rest // length * length if length else 0

    def block(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(one, carry, xs)

    if length < rest:
        part = jax.tree.map(lambda x: x[1 : 1 + whole], xs)
        blocks = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), part)
        # Inside of a loop there is nothing that XLA could merge the second evaluation with.
        remembered = jax.checkpoint(block, prevent_cse=False)  # pyright: ignore
        carry, ys = jax.lax.scan(remembered, carry, blocks)
        parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
        rest -= whole
    if rest:
        carry, ys = block(carry, jax.tree.map(lambda x: x[steps - rest :], xs))
        parts.append(ys)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
