"""What one image is to a model: its shape, its scale, and how a file becomes one."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._errors import explain


def as_float(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Bytes, 0 to 255, as floats in [0, 1]; floats as they are. The one place that scales images:
    for training, evaluation and new photographs alike."""
    if images.dtype == jnp.uint8:
        return images.astype(float) / 255
    return images


@dataclass(frozen=True)
class ImageFormat:
    """How training saw one image, which is how a new one has to come: `images.format` of what
    `from_folder` returns.

        em.data.ImageFormat((3, 32, 32), size=32, mode="RGB")  # where the images are not at hand

    - `shape`: `(channels, height, width)`.
    - `size`, `mode`: those that `from_folder` was given.
    - `scale`: what pixels are divided by. 255: they are bytes. 1: they were floats, of a scale that
      their source knows.
    - `from_files`: whether a file can be read so. Arrays of an .npz file and Omniglot, which is
      inverted and shrunk in a way of its own, do not say how they were made.
    """

    shape: tuple[int, int, int]
    size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    scale: int = 255
    from_files: bool = True

    def scaled(self, pixels: Any, argument: str) -> Float[np.ndarray, "channels height width"]:
        """One image as a model takes it, from an array: bytes, or floats that are scaled already.

        Raises `ValueError` or `TypeError`, naming `argument`, for another shape, dtype or scale."""
        pixels = np.asarray(pixels)
        expected = f"[channels, height, width], {list(self.shape)}"
        if pixels.shape != self.shape:
            received = f"shape {list(pixels.shape)}"
            if sorted(pixels.shape) == sorted(self.shape):
                expected += "; `np.moveaxis(x, -1, 0)` puts channels first"
            else:
                expected += ". A file of another size is resized: pass its path"
            message = f"`{argument}` has another shape than the images of training."
            raise ValueError(explain(message, received, expected))
        message = f"`{argument}` has another scale than the images of training."
        if pixels.dtype == np.uint8 and self.scale == 255:
            return np.asarray(as_float(jnp.asarray(pixels)))
        floats = "floats in [0, 1] or uint8" if self.scale == 255 else "floats, as they were"
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise TypeError(explain(message, pixels.dtype, floats))
        low, high = pixels.min(), pixels.max()
        sound = low >= 0 and high <= 1 if self.scale == 255 else np.isfinite(pixels).all()
        if not sound:
            raise ValueError(explain(message, f"values from {low} to {high}", floats))
        return pixels.astype(jnp.zeros(()).dtype)
