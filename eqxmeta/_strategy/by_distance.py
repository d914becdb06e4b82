"""Classification by distances between features; the distance may be learnt too."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._model.features import embedded
from .._model.state import MetaParameters, meta_parameters
from .classes import ByFeatures

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


class PrototypeClassifier(eqx.Module):
    """Maps one example to logits `[classes]`, `-d(f(x), c_k)`.

    - `embedding`: f, the user's own model, or made of it. `distance`: d.
    - `prototypes`: c, `[classes, features]`, the mean of each class of the support set.
    - `present`: `[classes]`, whether the class was in the support set; the logit of one that was
      not is minus infinity.
    """

    embedding: PyTree
    distance: Distance
    prototypes: Float[Array, "classes features"]
    present: Bool[Array, " classes"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " classes"]:
        feature = embedded(self.embedding, x, key)
        distances = jax.vmap(lambda c: self.distance(feature, c))(self.prototypes)
        return jnp.where(self.present, -distances, -jnp.inf)


class ByDistance(ByFeatures):
    """A classifier by distances from the features of the support set."""

    distance: Literal["euclidean", "cosine"] | Distance = eqx.field(
        default="euclidean", kw_only=True
    )

    def __post_init__(self):
        super().__post_init__()
        distance = self.distance
        sound = callable(distance) and not isinstance(distance, type)
        sound = sound or (isinstance(distance, str) and distance in _NAMED)
        expected = "'euclidean', 'cosine' or a function of two vectors of features"
        check_argument(sound, distance, f"{type(self).__name__}(distance=...)", expected)

    def meta_model(self, model: PyTree) -> PyTree:
        distance = self._distance()
        return MetaParameters(model, distance) if _is_learnt(distance) else model

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
