"""Random distinct integers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray


def distinct(key: PRNGKeyArray, n: int | Int[Array, ""], k: int) -> Int[Array, " {k}"]:
    """`k` distinct integers from `range(n)`, `n >= k`, uniformly and in random order.

    A Fisher-Yates shuffle of which only the first `k` places are worked out: step `i` swaps place
    `i` with place `target[i] >= i`. Each swap is traced back to where its value came from, for
    all steps at once, so the cost is of the order of `k * k` whatever `n` is, `n` may be traced,
    and there is no loop. (A top-k of random scores would cost as much as the largest `n`.)
    """
    step = jnp.arange(k, dtype=jnp.int32)
    target = jax.random.randint(key, (k,), step, n, dtype=jnp.int32)
    # What a step finds at a place was put there by the last earlier step that aimed at it, if
    # any; otherwise the place still holds its own number.
    own = _last_hit(target, step)
    aimed = _last_hit(target, target)
    # A step puts at its target what it found at its own place, which an earlier step may have put
    # there, and so on back. Doubling the stride reaches the start of every such chain.
    origin = jnp.where(own < 0, step, own)
    for _ in range((k - 1).bit_length()):
        origin = origin[origin]
    return jnp.where(aimed < 0, target, origin[aimed])


def _last_hit(target: Int[Array, " k"], place: Int[Array, " k"]) -> Int[Array, " k"]:
    """For each step `i`, the last step `j < i` with `target[j] == place[i]`, or -1."""
    step = jnp.arange(place.shape[0], dtype=jnp.int32)
    hit = (step[None, :] < step[:, None]) & (target[None, :] == place[:, None])
    return jnp.max(jnp.where(hit, step[None, :], -1), axis=1)
