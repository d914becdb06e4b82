"""Strategies that classify by distances between features; the distance may be learnt too."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._arguments import check_argument, check_int_or_none
from .._model.state import MetaParameters, meta_parameters
from .._types import Loss
from .gradient_strategy import GradientStrategy

# From two vectors of features, `[d]` each, to a scalar.
Distance: TypeAlias = Callable[[Array, Array], Array]


class Cosine(eqx.Module):
    """`-s cos(a, b)`: the scale s is learnt, as its logarithm, and begins at 10."""

    log_scale: Float[Array, ""]

    def __init__(self):
        self.log_scale = jnp.asarray(math.log(10.0))

    def __call__(self, a: Float[Array, " d"], b: Float[Array, " d"]) -> Float[Array, ""]:
        # Not of norm zero: the prototype of a class that is not there is a vector of zeros.
        cosine = optax.losses.cosine_similarity(a, b, epsilon=1e-12)
        return -jnp.exp(self.log_scale).astype(cosine.dtype) * cosine


def squared_euclidean(a: Float[Array, " d"], b: Float[Array, " d"]) -> Float[Array, ""]:
    return jnp.sum((a - b) ** 2)


_NAMED: dict[str, Callable[[], Distance]] = {
    "euclidean": lambda: squared_euclidean,
    "cosine": Cosine,
}


class ByDistance(GradientStrategy):
    """A classifier by distances from the features of the support set, without an inner gradient.
    Before it has seen a support set nothing predicts."""

    loss: Loss
    optimizer: optax.GradientTransformation
    distance: Literal["euclidean", "cosine"] | Distance = eqx.field(
        default="euclidean", kw_only=True
    )
    ways: int | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        name = type(self).__name__
        argument = f"{name}(ways=...)"
        self.ways = check_int_or_none(self.ways, argument, minimum=1, what="classes")
        distance = self.distance
        sound = callable(distance) and not isinstance(distance, type)
        sound = sound or (isinstance(distance, str) and distance in _NAMED)
        expected = "'euclidean', 'cosine' or a function of two vectors of features"
        check_argument(sound, distance, f"{name}(distance=...)", expected)

    def meta_model(self, model: PyTree) -> PyTree:
        distance = self._distance()
        return MetaParameters(model, distance) if _is_learnt(distance) else model

    def unadapted(self, model: PyTree) -> None:
        return None

    def embedding_and_distance(self, model: PyTree) -> tuple[PyTree, Distance]:
        """Of what `TrainState.model` holds."""
        distance = self._distance()
        if not _is_learnt(distance):
            return model, distance
        learnt = meta_parameters(model, type(self).__name__)
        return learnt.model, learnt.extra

    def _distance(self) -> Any:
        return _NAMED[self.distance]() if isinstance(self.distance, str) else self.distance


def _is_learnt(distance: Distance) -> bool:
    return any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(distance))
