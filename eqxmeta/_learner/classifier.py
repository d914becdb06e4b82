"""What names a photograph."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._errors import explain
from .._images.format import ImageFormat
from .._images.read import read_image
from .._model.predict import predict


class Classifier(eqx.Module):
    """Names photographs, as `Learner.adapt` has made it.

        classifier("new.jpg")  # [("Avocado", 0.93), ("Kiwi", 0.05), ("Mango", 0.02)]

    - `names`: of the classes, in the order in which they were given.
    - `model`: the adapted model, one image to logits.
    - `format`: what an image has to be.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    model: PyTree = eqx.field(repr=False)
    format: ImageFormat = eqx.field(static=True)

    def __call__(self, photo: Any) -> list[tuple[str, float]]:
        """Each class with its probability, the most probable first. Of equal ones the first given
        is first.

        `photo`: a path, read as training read its images; or an array `[channels, height, width]`,
        uint8 or floats in [0, 1]. Raises what `read_image` raises, and `ValueError` or `TypeError`
        for an array of another shape, dtype or scale, or if the model's output is NaN.
        """
        x = as_image(photo, self.format, "photo")
        return ranked(self.names, _logits(self.model, jnp.asarray(x)))


def ranked(names: tuple[str, ...], outputs: Any) -> list[tuple[str, float]]:
    """The names with their probabilities, of logits `[names or more]`, the most probable first."""
    logits = np.asarray(outputs, np.float64)[: len(names)]
    if np.isnan(logits).any():
        message, expected = "The adapted model predicts NaN.", "numbers: smaller inner steps"
        raise ValueError(explain(message, logits.tolist(), expected))
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [(names[i], float(shares[i])) for i in order]


def as_image(
    photo: Any, format: ImageFormat, argument: str
) -> Float[np.ndarray, "channels height width"]:
    """A path or an array as a model takes it."""
    if isinstance(photo, str | Path):
        return read_image(photo, like=format)
    return format.scaled(photo, argument)


@eqx.filter_jit
def _logits(model: PyTree, x: Float[Array, "channels height width"]) -> Float[Array, " classes"]:
    return predict(model, x[None])[0]


def output_shape(model: PyTree, format: ImageFormat) -> tuple[int, ...]:
    """Of what `model`, which may be of shapes, predicts for one image. Nothing is compiled."""
    x = jax.ShapeDtypeStruct(format.shape, jnp.zeros(()).dtype)
    return eqx.filter_eval_shape(lambda model, x: predict(model, x[None])[0], model, x).shape
