"""The base class of strategies whose outer step descends the query loss."""

import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._model.state import TrainState
from .._task.layout import TaskChunk, check_task_chunk
from .._task.task import Task
from .._types import Loss, Metrics
from .outer_step import adapt_with_metrics, descend, init_state, query_loss, split_or_none
from .strategy import Strategy


class GradientStrategy(Strategy):
    """A strategy whose outer step descends the gradient, through `inner_adapt`, of the query
    loss: the mean over tasks of `loss(inner_adapt(model, support), query)`.

    A subclass adds fields `loss` and `optimizer` (the outer one) and the method `inner_adapt`. One
    that learns more than an initialisation also has `meta_model` and `unadapted`.

    `task_chunk`: how many tasks are computed at a time. `None` is all of them, in parallel under
    `vmap`. A number is at most that many, in chunks of equal size; the meta-gradient of each chunk
    is added to that of those before, so that memory is in proportion to the chunk and the result
    the same to rounding. `"auto"` is all, but one at a time where a task is large and the device a
    CPU.

    Metrics: `loss` (query loss after adaptation), `loss_before` (before, if there is anything
    before), `grad_norm`, those that the loss reports (after, and as `<name>_before`), and
    `support_loss/<i>` for every inner step if the subclass also has `inner_rollout`.
    """

    loss: eqx.AbstractVar[Loss]
    optimizer: eqx.AbstractVar[optax.GradientTransformation]
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def __check_init__(self):
        check_task_chunk(self.task_chunk, f"{type(self).__name__}(task_chunk=...)")

    def init(self, model: PyTree) -> TrainState:
        return init_state(self, self.meta_model(model), self.optimizer)

    def meta_model(self, model: PyTree) -> PyTree:
        """What is meta-learnt, made from the user's `model`: that model, or an `eqx.Module` with a
        field `model` that holds it and other fields with the rest. `unadapted` is its inverse."""
        return model

    @eqx.filter_jit
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        def task_loss(model: PyTree, task: Task, key: PRNGKeyArray | None):
            adapt_key, query_key = split_or_none(key)
            adapted, metrics = adapt_with_metrics(self, model, task.support, key=adapt_key)
            loss, query_metrics = query_loss(
                self.loss, self.unadapted(model), adapted, task, query_key
            )
            return loss, metrics | query_metrics

        return descend(
            self, task_loss, self.optimizer, state, tasks, key=key, task_chunk=self.task_chunk
        )
