"""The base class of strategies whose outer step descends an objective of the tasks."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_optimizer
from .._errors import explain
from .._keys import split_or_none
from .._meta_gradient.estimator import Estimator, ReverseMode
from .._model.state import MetaParameters, TrainState
from .._task.layout import OverTasks, TaskChunk, check_task_chunk
from .._task.task import Task
from .._types import Metrics
from .metrics import by_step, check_task_loss_output, learning_rate
from .outer_step import (
    adapt_with_metrics,
    apply_gradient,
    check_state,
    init_state,
    mean_over_tasks,
    query_loss,
)
from .strategy import Strategy, partition_learnt


class GradientStrategy(Strategy):
    """A strategy whose outer step descends the gradient of the mean over tasks of `task_loss`: by
    default the query loss after adaptation, `loss(inner_adapt(model, support), query)`.

    A subclass adds fields `loss` and `optimizer` (the outer one) and the method `inner_adapt`, or
    is a `RolloutStrategy` too. One that descends another objective writes `task_loss`, one that
    learns more than an initialisation `meta_model`.

    `task_chunk`: how many tasks are computed at a time, a microbatch of tasks. `None` is all of
    them, in parallel under `vmap`. A number is at most that many, in chunks of equal size; the
    meta-gradient of each chunk is added to that of those before, so that memory is in proportion to
    the chunk and the result the same to rounding. `"auto"` is all, but one at a time where a task
    is large and the device a CPU.

    `estimator`: how the gradient is taken, see `eqxmeta.Estimator`; by default exactly.

    Metrics: `loss` (query loss after adaptation), `loss_before` (before, if there is anything
    before), `grad_norm`, those that the loss reports (after, and as `<name>_before`), and
    `support_loss/<i>` for every inner step of a `RolloutStrategy`.
    """

    optimizer: eqx.AbstractVar[optax.GradientTransformation]
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)
    estimator: Estimator = eqx.field(default=ReverseMode(), kw_only=True)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.task_loss)
        try:
            signature.bind("self", "model", "task", step="step", key="key")
        except TypeError as error:
            message = f"`{cls.__name__}.task_loss` does not take what it is called with."
            expected = "`task_loss(self, model, task, *, step, key)`"
            raise TypeError(explain(message, f"`task_loss{signature}`", expected)) from error

    def __check_init__(self):
        name = type(self).__name__
        check_optimizer(self.optimizer, f"{name}(optimizer=...)")
        check_task_chunk(self.task_chunk, f"{name}(task_chunk=...)")
        sound = callable(self.estimator) and not isinstance(self.estimator, type)
        expected = "an `Estimator`, such as `eqxmeta.ReverseMode()`"
        check_argument(sound, self.estimator, f"{name}(estimator=...)", expected, TypeError)

    def init(self, model: PyTree) -> TrainState:
        learnt, name = self.meta_model(model), f"`{type(self).__name__}.meta_model`"
        expected = "`eqxmeta.MetaParameters(model, extra)`, with all that is learnt in `extra`"
        if not isinstance(learnt, MetaParameters | type(model)) and not callable(learnt):
            message = f"{name} returned neither a model nor `MetaParameters`."
            raise TypeError(explain(message, f"a `{type(learnt).__name__}`", expected))
        extra = learnt.extra if isinstance(learnt, MetaParameters) else None
        leaves = jax.tree_util.tree_leaves_with_path(extra)
        numbers = [f"extra{jax.tree_util.keystr(p)}={x}" for p, x in leaves if type(x) is float]
        if numbers:  # which would stay as they are
            message = f"{name} returned numbers of Python, which are not learnt."
            raise TypeError(explain(message, ", ".join(numbers), f"{expected}, as arrays"))
        return init_state(self, learnt, self.optimizer)

    def meta_model(self, model: PyTree) -> PyTree:
        """What `TrainState.model` holds, made from the user's `model`: that model, or
        `eqxmeta.MetaParameters(model, extra)` where more is learnt."""
        return model

    def task_loss(
        self,
        model: PyTree,
        task: Task,
        *,
        step: Int[Array, ""],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """`(objective, metrics)` of one task: what the outer step descends, its mean over tasks,
        and what is reported.

        - `step`: the outer steps taken so far, for what changes in the course of training.
        - Metrics are scalars, or `[K]`, which are logged as `<name>/0`, `<name>/1`, ... If they
          have a `loss`, the query loss after adaptation, that is logged as `loss` and the objective
          as `objective`; otherwise the objective is the `loss`.
        """
        adapt_key, query_key = split_or_none(key)
        adapted, metrics = adapt_with_metrics(self, model, task.support, key=adapt_key)
        loss, more = query_loss(self.loss, self.unadapted(model), adapted, task, query_key)
        return loss, metrics | more

    @eqx.filter_jit
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        check_state(state)
        params, rest = partition_learnt(self, state.model)

        def meta_gradient(over: OverTasks) -> PyTree:
            def one(params: PyTree, task: Task, key: Any):
                model = eqx.combine(params, rest)
                out = self.task_loss(model, task, step=state.step, key=key)
                check_task_loss_output(out, type(self).__name__)
                return out

            def objective(params: PyTree):
                values = over(lambda task, key: one(params, task, key))
                return jax.tree.map(lambda x: jnp.mean(x, axis=0), values)

            return self.estimator(objective, params, key=key)

        (value, metrics), grads = mean_over_tasks(meta_gradient, tasks, key, self.task_chunk)
        name = "objective" if "loss" in metrics else "loss"
        metrics = {name: value, **by_step(metrics), "grad_norm": optax.tree.norm(grads)}
        new = apply_gradient(self, self.optimizer, state, grads, value=value)
        return new, learning_rate(new.opt_state) | metrics
