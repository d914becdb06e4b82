"""Joint training, then fine-tuning: the baseline."""

import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._meta_gradient.inner_loop import InnerLoop
from .._model.state import TrainState
from .._strategy.by_inner_loop import ByInnerLoop
from .._strategy.outer_step import (
    adapt_with_metrics,
    descend,
    init_state,
    query_loss,
    split_or_none,
    stop_gradient,
)
from .._task.layout import TaskChunk
from .._task.task import Task
from .._types import Loss, Metrics


class Joint(ByInnerLoop):
    """The naive baseline: one model for the examples of all tasks, then fine-tuning.

    The outer step descends the mean loss over support and query examples of all tasks together;
    nothing in it knows of adaptation. `inner_adapt` fine-tunes with `inner`. On sinusoids it
    learns their average ("pretrained" in Finn, Abbeel, Levine 2017, section 5.1).

    Metrics as for `MAML`, so that the two can be compared, and `pooled_loss`, which is what is
    descended. Arguments as for `MAML`; `inner.gradient` plays no part.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def init(self, model: PyTree) -> TrainState:
        return init_state(self, model, self.optimizer)

    @eqx.filter_jit
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        def task_loss(model: PyTree, task: Task, key: PRNGKeyArray | None):
            pooled_key, report_key = split_or_none(key)
            adapt_key, query_key = split_or_none(report_key)
            pooled, _ = self.loss(model, task.pooled, pooled_key)
            frozen = stop_gradient(model)  # the rest is for reporting
            adapted, metrics = adapt_with_metrics(self, frozen, task.support, key=adapt_key)
            after, query_metrics = query_loss(self.loss, frozen, adapted, task, query_key)
            return pooled, {"loss_after": after, **metrics, **query_metrics}

        state, metrics = descend(
            self, task_loss, self.optimizer, state, tasks, key=key, task_chunk=self.task_chunk
        )
        return state, metrics | {"pooled_loss": metrics["loss"], "loss": metrics.pop("loss_after")}
