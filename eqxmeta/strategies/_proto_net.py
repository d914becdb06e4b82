"""Prototypical networks."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._arguments import check_int_or_none
from .._model.features import embedded
from .._model.features import features as features_of
from .._strategy.classes import labelled_examples, num_classes, prototypes
from .._strategy.gradient_strategy import GradientStrategy
from .._types import Loss


class PrototypeClassifier(eqx.Module):
    """Maps one example to logits `[classes]`, `-‖f(x) - c_k‖²`.

    - `embedding`: f, the user's own model.
    - `prototypes`: c, `[classes, features]`, the mean of each class of the support set.
    - `present`: `[classes]`, whether the class was in the support set; the logit of one that was
      not is minus infinity.
    """

    embedding: PyTree
    prototypes: Float[Array, "classes features"]
    present: Bool[Array, " classes"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " classes"]:
        differences = embedded(self.embedding, x, key)[None, :] - self.prototypes
        return jnp.where(self.present, -jnp.sum(differences**2, axis=1), -jnp.inf)


def _check_ways(ways: Any) -> int | None:
    return check_int_or_none(ways, "ProtoNet(ways=...)", minimum=1, what="classes")


class ProtoNet(GradientStrategy):
    """Prototypical networks: an embedding in which a class is where the mean of its examples is.

    Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equations 1 and 2: `c_k` is the mean of `f(x)`
    over the support examples of class k, and `p(y = k | x) ∝ exp(-‖f(x) - c_k‖²)`. There is no
    inner gradient; the outer step descends `loss` on the query set in the parameters of f.

    The model that is trained is f: one example to an array, which counts as a vector.
    `inner_adapt` returns a `PrototypeClassifier`, one example to logits. Tasks are classification
    tasks, `(x, y)` with integer labels `y: [n]` from 0; more ways may be used for training than for
    testing, as in the paper, and classes need not be of one size or in order.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `optimizer`: the outer optax optimizer. `task_chunk`: see `GradientStrategy`; `learn`:
      see `Strategy`.
    - `ways`: the number of logits, if all tasks have the same number of classes or a known most.
      `None`: what the labels say, where they are at hand (a call of `inner_adapt` by itself). In a
      compiled program, such as training, they are not, but no class has less than one example:
      there are as many logits as support examples. A class that is not there has a logit of minus
      infinity, a probability of zero, so that loss and accuracy do not depend on it.

    Before adaptation there is no classifier: no metric `loss_before`, and in an `Evaluation` the
    column of step 0 is NaN; that of step 1 is what counts.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    ways: int | None = eqx.field(default=None, kw_only=True, converter=_check_ways)

    def unadapted(self, model: PyTree) -> None:
        return None

    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PrototypeClassifier:
        x, y, weight = labelled_examples(support)
        return _classifier(model, x, y, weight, num_classes(y, self.ways), key)


@eqx.filter_jit
def _classifier(
    model: PyTree,
    x: PyTree,
    y: Array,
    weight: Array | None,
    classes: int,
    key: PRNGKeyArray | None,
) -> PrototypeClassifier:
    features, model = features_of(model, x, key=key, weight=weight)
    return PrototypeClassifier(model, *prototypes(features, y, weight, classes))
