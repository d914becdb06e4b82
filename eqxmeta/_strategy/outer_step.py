"""The outer step: what is computed of every task, its mean over tasks, and the optimizer's step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._errors import annotate_errors, explain, succeeds
from .._keys import used_again
from .._model.check import check_stateless
from .._model.state import TrainState, to_be_trained, without_weak_types
from .._model.support_statistics import with_support_statistics
from .._model.update_of import update_of
from .._task.layout import OverTasks, TaskChunk, in_chunks
from .._task.task import Task, check_batch, count_tasks, shapes_of
from .._types import Loss, Metrics
from .metrics import check_loss_output
from .rollout_strategy import RolloutStrategy
from .strategy import Strategy, partition_learnt


def init_state(
    strategy: Strategy, model: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """State before the first outer step, of an `optimizer` that looks after what is learnt."""
    model = to_be_trained(model)
    params, _ = partition_learnt(strategy, model)
    opt_state = without_weak_types(optimizer.init(params))
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        message = "`outer_update(state, ...)` is not a state."
        expected = "a `TrainState`, as `strategy.init(model)` gives it"
        raise TypeError(explain(message, type(state).__name__, expected))
    check_stateless(state.model, "outer_update(state, ...)")


def mean_over_tasks(
    fun: Callable[[OverTasks], PyTree],
    tasks: Task,
    key: PRNGKeyArray | None,
    task_chunk: TaskChunk = "auto",
) -> PyTree:
    """The mean over `tasks` of what `fun(over)` computes as a mean over the tasks of `over`, a few
    at a time. For an `outer_update` of your own.

    - `over(one)` is `one(task, key)` for each of some tasks, results stacked along a leading axis.
      `fun` takes the mean over that axis, and may differentiate it.
    - `tasks`: a batch. `key` is split over all of them, whatever the chunks; or `None`.
    - `task_chunk`: see `GradientStrategy`. Of results that are not floating point, such as
      counters, those of the last chunk are returned.
    """
    check_batch(tasks, "outer_update(..., tasks)")

    def is_one_task(error: Exception) -> bool:  # which may look like a batch
        one = jax.tree.map(lambda x: x[None], tasks)
        return succeeds(lambda: jax.eval_shape(lambda: in_chunks(fun, one, key, task_chunk)))

    with annotate_errors(
        "`outer_update(state, tasks)`",
        f"{count_tasks(tasks)} tasks, of support {shapes_of(tasks.support)} and query "
        f"{shapes_of(tasks.query)}",
        "a batch of tasks: a leading task axis, then the example axis, then one example as the "
        "model takes it. Of one task: `jax.tree.map(lambda x: x[None], task)`",
        seen=is_one_task,
    ):
        return in_chunks(fun, tasks, key, task_chunk)


def apply_gradient(
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: PyTree,
    *,
    value: Float[Array, ""],
) -> TrainState:
    """The state after one step of the outer `optimizer` along `grads`, those of what is learnt;
    `value` is for those that look at the objective."""
    params, rest = partition_learnt(strategy, state.model)
    update = update_of(optimizer, "The outer `optimizer`")
    updates, opt_state = update(grads, state.opt_state, params, value)
    params = optax.apply_updates(params, updates)
    return TrainState(state.step + 1, eqx.combine(params, rest), opt_state)


def adapt_with_metrics(
    strategy: Strategy, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None
) -> tuple[PyTree, dict[str, Array]]:
    """The adapted model and, where the strategy can tell, the support loss before every step."""
    if isinstance(strategy, RolloutStrategy):
        adaptation = strategy.inner_rollout(model, support, key=key)
        return adaptation.model, {"support_loss": adaptation.losses}
    adapted = strategy.inner_adapt(model, support, key=key)
    _check_adapted(strategy, model, adapted)
    return adapted, {}


def _check_adapted(strategy: Strategy, model: PyTree, adapted: Any) -> None:
    """That a strategy of the user's own gives a model, not something that has one among it."""
    containers = tuple | list | dict | jax.Array | None
    same = type(adapted) is type(strategy.unadapted(model))
    if isinstance(adapted, containers) and not same:
        parts = ", ".join(type(x).__name__ for x in adapted) if isinstance(adapted, tuple) else ""
        message = f"`{type(strategy).__name__}.inner_adapt` returned something else than a model."
        received = f"{type(adapted).__name__}({parts})" if parts else type(adapted).__name__
        expected = "the adapted model alone"
        raise TypeError(explain(message, received, expected))


def query_loss(
    loss: Loss, unadapted: PyTree | None, adapted: PyTree, task: Task, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Query loss after adaptation, and the metrics of before (unless `None`) and after."""

    def on_query(model: PyTree) -> tuple[Float[Array, ""], Metrics]:
        # The same dropout before and after, so that the difference is that of the adaptation.
        statistics_key, loss_key = used_again(key), used_again(key)
        model = with_support_statistics(loss, model, task.support, key=statistics_key)
        out = loss(model, task.query, loss_key)
        check_loss_output(out)
        return out

    after, metrics_after = on_query(adapted)
    if unadapted is None:
        return after, metrics_after
    # Stopped at its input, so that nothing of it is kept for the backward pass.
    before, metrics_before = on_query(stop_gradient(unadapted))
    metrics = {"loss_before": before, **metrics_after}
    return after, metrics | {f"{name}_before": value for name, value in metrics_before.items()}


def stop_gradient(model: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, model)
