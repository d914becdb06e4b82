"""What is done to images that have been drawn: turned, augmented."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PRNGKeyArray, Shaped

# The keys of augmentations come from a stream of their own: what is drawn stays what it was.
_STREAM = 0x61756776


def augment_keys(key: PRNGKeyArray, examples: int) -> Key[Array, " {examples}"]:
    """A key for each example of a task that is drawn with `key`."""
    return jax.random.split(jax.random.fold_in(key, _STREAM), examples)


def augmented(
    functions: Sequence[Callable], images: Shaped[Array, "n ..."], keys: Key[Array, " n"]
) -> Shaped[Array, "n ..."]:
    """Each image, with a key of its own, by `functions` one after another."""

    def one(image: Array, key: PRNGKeyArray) -> Array:
        for number, function in enumerate(functions):
            image = function(image, key=jax.random.fold_in(key, number))
        return image

    return jax.vmap(one)(images, keys)


def turned(image: Shaped[Array, "..."], turn: Int[Array, ""]) -> Shaped[Array, "..."]:
    """`rot90(image, turn)`, for `turn` in `range(4)`: by half a turn, then by a quarter."""
    image = jnp.where(turn >= 2, jnp.flip(image, (-2, -1)), image)
    return jnp.where(turn % 2 == 1, jnp.rot90(image, axes=(-2, -1)), image)
