"""What strategies that adapt by an inner loop share."""

import abc

import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.support_statistics import with_support_statistics
from .._task.layout import TaskChunk
from .._types import Loss
from .arguments import check_arguments
from .strategy import Strategy


class RollsOut(Strategy):
    """A strategy that shows its inner steps: `inner_adapt` is where `inner_rollout` arrives, with
    the statistics of the support set for the layers that normalise by them."""

    loss: eqx.AbstractVar[Loss]
    inner: eqx.AbstractVar[InnerLoop]
    optimizer: eqx.AbstractVar[optax.GradientTransformation]
    task_chunk: eqx.AbstractVar[TaskChunk]

    def __check_init__(self):
        name = type(self).__name__
        check_arguments(name, self.loss, self.inner, self.optimizer, self.task_chunk)

    @abc.abstractmethod
    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        """`model` adapted to `support`; `options` are those of `InnerLoop.__call__`."""

    @eqx.filter_jit
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        adapted = self.inner_rollout(model, support, key=key).model
        return with_support_statistics(self.loss, adapted, support, key=key)


class ByInnerLoop(RollsOut):
    """Adapts by the loop `inner`, as it is, on `loss`."""

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        return self.inner(self.loss, model, support, **options)
