"""Reptile."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_choice, check_int_or_none, check_optimizer
from .._keys import split_or_none
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.state import TrainState
from .._strategy.metrics import by_step
from .._strategy.outer_step import (
    apply_gradient,
    check_state,
    init_state,
    mean_over_tasks,
    query_loss,
)
from .._strategy.rollout_strategy import RolloutStrategy, on_minibatches
from .._strategy.strategy import partition_learnt
from .._task.layout import OverTasks, TaskChunk, check_task_chunk
from .._task.task import Task
from .._types import Loss, Metrics


class ReptileOptState(eqx.Module):
    """`outer`: state of the outer optimizer. `inner`: of the inner one, if it is carried."""

    outer: PyTree
    inner: PyTree


class Reptile(RolloutStrategy):
    """Reptile: move the initialisation towards the weights that tasks adapt to.

    Each task takes `inner.steps` steps on minibatches of all its examples, support and query
    together, and the outer step is `θ ← θ + ε (mean(φ) - θ)`: Nichol, Achiam, Schulman 2018
    (arXiv 1803.02999), algorithms 1 and 2. The step goes through optax: `optimizer` receives
    `θ - mean(φ)` as if it were a gradient, so that `optax.sgd(ε)` is the paper's update and a
    schedule for its learning rate anneals it.

    - `loss`, `inner`, `optimizer`: as for `MAML`; `inner.gradient` plays no part. The paper's
      inner optimizer is `optax.adam(rate, b1=0)`. An outer one that looks at a `value` gets the
      metric `loss`.
    - `task_chunk`, `learn`: as for `MAML`.
    - `batch_size`: examples per inner step, drawn without replacement, reshuffled when the
      task's examples are used up, as in the paper's code. `None`, or more than there are: all.
      Examples of weight 0 are not drawn.
    - `inner_state`: `"reset"` starts every task from a fresh inner optimizer; `"carry"` from the
      state that the last outer step left (its mean over the meta-batch, counters excepted), as
      the paper's code does. `inner_adapt` always starts fresh.

    Metrics: `loss` and `loss_before` on the query set, `support_loss/<i>` (the minibatch loss at
    each inner step), `grad_norm` (of `θ - mean(φ)`), and those of the loss.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    batch_size: int | None = eqx.field(default=None, kw_only=True)
    inner_state: Literal["reset", "carry"] = eqx.field(default="reset", kw_only=True)
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def __post_init__(self):
        check_choice(self.inner_state, "Reptile(inner_state=...)", ("reset", "carry"))
        argument = "Reptile(batch_size=...)"
        self.batch_size = check_int_or_none(self.batch_size, argument, minimum=1, what="examples")
        check_optimizer(self.optimizer, "Reptile(optimizer=...)")
        check_task_chunk(self.task_chunk, "Reptile(task_chunk=...)")

    def init(self, model: PyTree) -> TrainState:
        state = init_state(self, model, self.optimizer)
        inner = self.inner.init(state.model) if self.inner_state == "carry" else None
        return TrainState(state.step, state.model, ReptileOptState(state.opt_state, inner))

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        return on_minibatches(self.inner, self.loss, model, support, self.batch_size, **options)

    @eqx.filter_jit
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        check_state(state)

        def adapt(task: Task, key: PRNGKeyArray | None):
            adapt_key, query_key = split_or_none(key)
            end = self.inner_rollout(
                state.model, task.pooled, key=adapt_key, opt_state=state.opt_state.inner
            )
            loss, metrics = query_loss(self.loss, state.model, end.model, task, query_key)
            adapted, _ = partition_learnt(self, end.model)
            carried = end.opt_state if self.inner_state == "carry" else None
            carried = eqx.filter(carried, eqx.is_array)
            return adapted, carried, {"loss": loss, "support_loss": end.losses, **metrics}

        def mean(over: OverTasks) -> PyTree:
            # Floats, such as moments, are averaged; counters agree.
            def of_tasks(x: Array) -> Array:
                return jnp.mean(x, axis=0) if eqx.is_inexact_array(x) else x[0]

            return jax.tree.map(of_tasks, over(adapt))

        adapted, inner, metrics = mean_over_tasks(mean, tasks, key, self.task_chunk)
        params, _ = partition_learnt(self, state.model)
        towards = jax.tree.map(lambda p, a: p - a, params, adapted)

        outer = TrainState(state.step, state.model, state.opt_state.outer)
        outer = apply_gradient(self, self.optimizer, outer, towards, value=metrics["loss"])
        metrics = by_step(metrics) | {"grad_norm": optax.tree.norm(towards)}
        inner = eqx.combine(inner, state.opt_state.inner)  # with what is no array in it
        opt_state = ReptileOptState(outer.opt_state, inner)
        return TrainState(outer.step, outer.model, opt_state), metrics
