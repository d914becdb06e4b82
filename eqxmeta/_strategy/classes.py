"""Classes of a support set, and the base classes of strategies that wait for them."""

import abc
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_int_or_none
from .._errors import explain
from .._task.examples import examples
from .._types import Loss
from .gradient_strategy import GradientStrategy

LabelledExamples: TypeAlias = tuple[PyTree, Int[Array, " n"], Float[Array, " n"] | None]


class Classifies(GradientStrategy):
    """A strategy whose classes are those of the support set: before that nothing predicts.

    - `ways`: the number of logits; `None`: see `num_classes`.
    """

    ways: int | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        argument = f"{type(self).__name__}(ways=...)"
        self.ways = check_int_or_none(self.ways, argument, minimum=1, what="classes")

    def unadapted(self, model: PyTree) -> None:
        return None


class ByFeatures(Classifies):
    """A classifier that is computed from the features of the support set, without inner steps."""

    loss: Loss
    optimizer: optax.GradientTransformation

    @abc.abstractmethod
    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> PyTree:
        """What maps an example to `classes` logits, from `model`, what `TrainState.model` holds."""

    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        labelled = labelled_examples(support)
        return _classifier(self, model, labelled, num_classes(labelled[1], self.ways), key)


@eqx.filter_jit
def _classifier(
    strategy: ByFeatures,
    model: PyTree,
    support: LabelledExamples,
    classes: int,
    key: PRNGKeyArray | None,
) -> PyTree:
    return strategy.classifier(model, support, classes, key)


def labelled_examples(support: Any) -> LabelledExamples:
    """`(x, y, weight)` of a support set, the labels in 32 bits, and the weights `None` if there are
    none: see `examples`. Raises `TypeError` or `ValueError` unless it has an integer label for each
    example."""
    if not isinstance(support, tuple | list) or len(support) not in (2, 3):
        received, expected = str(jax.tree.structure(support)), "`(x, y)` or `(x, y, weight)`"
        raise TypeError(explain("`support` is not a pair.", received, expected))
    x, y, *_ = support
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    sound = (eqx.is_array(y) or isinstance(y, np.ndarray)) and y.ndim == 1 and y.size > 0
    if not sound or any(shape[:1] != y.shape for shape in shapes):
        labels = getattr(y, "shape", type(y).__name__)
        received = f"examples of shape {', '.join(map(str, shapes))}, labels of shape {labels}"
        expected = "integers `[n]`, a label for each of the n examples"
        raise ValueError(explain("The labels of `support` are invalid.", received, expected))
    if not jnp.issubdtype(y.dtype, jnp.integer):
        message = "The labels of `support` are not integers."
        raise TypeError(explain(message, y.dtype, "class numbers from 0"))
    x, y, weight = examples(support)
    # In 8 bits the number of classes would not be one of the labels' own.
    return x, y.astype(jnp.int32), weight


def num_classes(y: Int[Array, " n"], ways: int | None) -> int:
    """How many logits there are: `ways`; or what the labels say, where they are at hand. In a
    compiled program they are not, but no class has less than one example: as many as examples."""
    if ways is not None:
        return ways
    return y.shape[0] if isinstance(y, jax.core.Tracer) else max(int(np.asarray(y).max()), 0) + 1


def memberships(
    y: Int[Array, " n"], weight: Float[Array, " n"] | None, classes: int, dtype: Any
) -> tuple[Float[Array, "n classes"], Float[Array, " n"], Bool[Array, " classes"]]:
    """The labels, one-hot; the weights, of one where there are none; and whether each class is
    there. A label outside of `range(classes)` makes all labels NaN."""
    member, unknown = jax.nn.one_hot(y, classes, dtype=dtype), (y < 0) | (y >= classes)
    weight = jnp.ones(len(y), dtype) if weight is None else weight.astype(dtype)
    # A label without a class would only be left out: NaN instead of a plausible classifier.
    wrong = jnp.any(unknown & (weight > 0))
    return jnp.where(wrong, jnp.nan, member), weight, (weight @ member > 0) | wrong


def prototypes(
    features: Float[Array, "n d"],
    y: Int[Array, " n"],
    weight: Float[Array, " n"] | None,
    classes: int,
) -> tuple[Float[Array, "classes d"], Bool[Array, " classes"]]:
    """The mean of the features of each class, by the weights if there are any, and whether the
    class is there. A label outside of `range(classes)` makes all of them NaN."""
    member, weight, present = memberships(y, weight, classes, features.dtype)
    share = weight[:, None] * member
    total = jnp.sum(share, axis=0)
    return share.T @ features / jnp.where(total > 0, total, 1)[:, None], present
