"""Prototypical networks."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._arguments import check_int_or_none
from .._errors import explain
from .._model.predict import predict, takes_key
from .._model.support_statistics import fill_statistics, without_statistics
from .._strategy.arguments import check_loss_and_optimizer
from .._strategy.gradient_strategy import GradientStrategy
from .._task.layout import TaskChunk
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
        f = self.embedding
        feature = f(x) if key is None or not takes_key(f) else f(x, key=key)
        differences = jnp.ravel(feature)[None, :] - self.prototypes
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
    - `optimizer`: the outer optax optimizer. `task_chunk`: see `GradientStrategy`.
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
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def __check_init__(self):
        check_loss_and_optimizer("ProtoNet", self.loss, self.optimizer, self.task_chunk)

    def unadapted(self, model: PyTree) -> None:
        return None

    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PrototypeClassifier:
        x, y = _examples(support)
        classes = self.ways
        if classes is None:
            known = not isinstance(y, jax.core.Tracer)
            classes = max(int(np.asarray(y).max()), 0) + 1 if known else y.shape[0]
        return _classifier(model, x, y, classes, key)


@eqx.filter_jit
def _classifier(
    model: PyTree, x: PyTree, y: Array, classes: int, key: PRNGKeyArray | None
) -> PrototypeClassifier:
    found = []

    def embed(model: PyTree) -> None:
        found.append(predict(model, x, key).reshape(y.shape[0], -1))

    # Layers that normalise by the support set keep, for queries, the statistics of this pass.
    model = fill_statistics(without_statistics(model), embed)
    if not found:  # there are no such layers
        embed(model)
    (features,) = found
    member = jax.nn.one_hot(y, classes, dtype=features.dtype)  # [examples, classes]
    count = jnp.sum(member, axis=0)
    prototypes = member.T @ features / jnp.maximum(count, 1)[:, None]
    # A label without a class would only be left out: NaN instead of a plausible classifier.
    wrong = jnp.any((y < 0) | (y >= classes))
    prototypes = jnp.where(wrong, jnp.nan, prototypes)
    return PrototypeClassifier(model, prototypes, (count > 0) | wrong)


def _examples(support: Any) -> tuple[PyTree, Array]:
    if not isinstance(support, tuple | list) or len(support) != 2:
        received = str(jax.tree.structure(support))
        raise TypeError(explain("`support` is not a pair.", received, "`(x, y)`"))
    x, y = support
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
    # In 8 bits the number of classes would not be one of the labels' own.
    return x, jnp.asarray(y).astype(jnp.int32)
