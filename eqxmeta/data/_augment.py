"""Random changes of images: flips and crops."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._arguments import check_int


def random_flip(
    image: Float[Array, "channels height width"], *, key: PRNGKeyArray
) -> Float[Array, "channels height width"]:
    """The image, or with probability 1/2 its mirror image (left and right change places).

    For training: `Episodes(..., augment=em.data.random_flip)`.
    """
    flip: Bool[Array, ""] = jax.random.bernoulli(key)
    return jnp.where(flip, image[..., ::-1], image)


def random_crop(padding: int) -> Callable[..., Float[Array, "channels height width"]]:
    """`augment(image, *, key) -> image`, which moves `image: [channels, height, width]` by up to
    `padding` pixels along both axes, every shift as likely as any other; what comes in is zero.

    It is the usual "pad by `padding` on every side, then crop to the size it had". For training:
    `Episodes(..., augment=[em.data.random_crop(padding=4), em.data.random_flip])`. Raises
    `TypeError` or `ValueError` for a padding that is not a positive integer.
    """
    padding = check_int(padding, "random_crop(padding=...)", minimum=1, what="pixels")
    return _RandomCrop(padding)


class _RandomCrop(eqx.Module):
    padding: int = eqx.field(static=True)

    def __call__(
        self, image: Float[Array, "channels height width"], *, key: PRNGKeyArray
    ) -> Float[Array, "channels height width"]:
        sides = (self.padding, self.padding)
        padded = jnp.pad(image, ((0, 0), sides, sides))
        row, column = jax.random.randint(key, (2,), 0, 2 * self.padding + 1)
        return jax.lax.dynamic_slice(padded, (jnp.zeros_like(row), row, column), image.shape)
