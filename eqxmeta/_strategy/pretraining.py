"""The base class of strategies that train on all classes at once, and adapt by a new head."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_int_or_none
from .._errors import explain
from .._model.features import features as features_of
from .._model.state import MetaParameters, meta_parameters
from .._task.task import Task, shapes_of
from .classes import Classifies
from .head_predictor import HeadPredictor, LinearHead
from .metrics import check_loss_output


def zero_head(classes: int, features: int) -> LinearHead:
    """Where the training of a linear head begins: its loss is convex."""
    return LinearHead(jnp.zeros((classes, features)), jnp.zeros(classes))


def unit(x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Of length one; zeros stay, and have a gradient of zero."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square == 0, 0, x / jnp.sqrt(jnp.where(square == 0, 1, square)))


class Pretraining(Classifies):
    """A strategy whose outer step descends `loss` on minibatches of all training classes, those of
    `eqxmeta.tasks.Minibatches`, and that adapts to a task by a new head on the features.

    The model that is trained is the body: one example to an array, which counts as a vector. What
    `TrainState.model` holds is `MetaParameters(body, head)`, the head that is trained with it; a
    body alone, pretrained elsewhere, adapts as well. A subclass says what a head is (`new_head`),
    and how it adapts.

    - `classes`: the number of classes that it is trained on, `Minibatches(...).num_classes`.
      `features`: the number of features of the body. Both are for training, and may be left out
      where a body only adapts.

    Metrics: `loss`, those that the loss reports, and `grad_norm`, all of the minibatch.
    """

    classes: int | None = eqx.field(default=None, kw_only=True)
    features: int | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for field in ("classes", "features"):
            argument = f"{type(self).__name__}({field}=...)"
            value = check_int_or_none(getattr(self, field), argument, minimum=1, what=field)
            setattr(self, field, value)

    @abc.abstractmethod
    def new_head(self, classes: int, features: int) -> Callable:
        """A head before it is trained, from `features` to `classes` logits: always the same."""

    def meta_model(self, model: PyTree) -> MetaParameters:
        if self.classes is None or self.features is None:
            message = f"`{type(self).__name__}` does not know the size of the head that it trains."
            received = f"classes={self.classes}, features={self.features}"
            expected = "both, such as `classes=minibatches.num_classes, features=64`"
            raise ValueError(explain(message, received, expected))
        return MetaParameters(model, self.new_head(self.classes, self.features))

    def task_loss(
        self, model: PyTree, task: Task, *, step: Int[Array, ""], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        name = type(self).__name__
        model = meta_parameters(model, name)
        if jax.tree.leaves(task.support):
            message = f"`{name}` trains on minibatches, not on few-shot tasks."
            received = f"a task with a support set, {shapes_of(task.support)}"
            expected = "`eqxmeta.tasks.Minibatches(images, labels, batch_size)`, in which a label "
            expected += "means the same class throughout; `Episodes` are to be evaluated on"
            raise ValueError(explain(message, received, expected))
        self._check_features(model.model, task.query, key)
        out = self.loss(HeadPredictor(model.model, model.extra, None), task.query, key)
        check_loss_output(out)
        return out

    def _check_features(self, body: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> None:
        made = jax.eval_shape(lambda: features_of(body, batch[0], key=key)[0]).shape[1]
        if made != self.features:
            message = f"`{type(self).__name__}(features=...)` is not what the body makes."
            received = f"features={self.features}, and {made} features of an example"
            raise ValueError(explain(message, received, f"features={made}"))
