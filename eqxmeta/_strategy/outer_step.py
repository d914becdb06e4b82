"""The outer step: what is computed of every task, its mean over tasks, and the optimizer's step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import used_again
from .._errors import annotate_errors, explain, succeeds
from .._meta_gradient.modes import conjugate_complex
from .._model.check import check_stateless
from .._model.state import TrainState
from .._model.support_statistics import with_support_statistics
from .._task.layout import OverTasks, TaskChunk, mean_over_tasks
from .._task.task import Task, check_batch, count_tasks, shapes_of
from .._types import Loss, Metrics
from .metrics import by_step, check_loss_output
from .strategy import Strategy, can_roll_out


def descend(
    task_loss: Callable[
        [PyTree, Task, PRNGKeyArray | None], tuple[Float[Array, ""], dict[str, Array]]
    ],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tasks: Task,
    *,
    key: PRNGKeyArray | None,
    task_chunk: TaskChunk = "auto",
) -> tuple[TrainState, Metrics]:
    """One step of `optimizer` along the gradient of the mean over tasks of
    `task_loss(model, task, key) -> (loss, metrics)`."""

    def meta_gradient(over_chunk: OverTasks) -> PyTree:
        params, static = eqx.partition(state.model, eqx.is_inexact_array)

        def meta_loss(params: PyTree) -> tuple[Float[Array, ""], dict[str, Array]]:
            def one(task: Task, key: PRNGKeyArray | None):
                return task_loss(eqx.combine(params, static), task, key)

            return jax.tree.map(lambda x: jnp.mean(x, axis=0), over_chunk(one))

        return jax.value_and_grad(meta_loss, has_aux=True)(params)

    (loss, metrics), grads = mean_over_batch(
        meta_gradient, state, tasks, key=key, task_chunk=task_chunk
    )
    metrics = {"loss": loss, **by_step(metrics), "grad_norm": optax.tree.norm(grads)}
    return apply_gradient(optimizer, state, conjugate_complex(grads)), metrics


def mean_over_batch(
    fun: Callable[[OverTasks], PyTree],
    state: Any,
    tasks: Any,
    *,
    key: PRNGKeyArray | None,
    task_chunk: TaskChunk,
) -> PyTree:
    """`mean_over_tasks` of what `outer_update(state, tasks)` was given, which is checked first."""
    if not isinstance(state, TrainState):
        message = "`outer_update(state, ...)` is not a state."
        expected = "a `TrainState`, as `strategy.init(model)` gives it"
        raise TypeError(explain(message, type(state).__name__, expected))
    check_stateless(state.model, "outer_update(state, ...)")
    check_batch(tasks, "outer_update(..., tasks)")

    def is_one_task(error: Exception) -> bool:  # which may look like a batch
        one = jax.tree.map(lambda x: x[None], tasks)
        return succeeds(lambda: jax.eval_shape(lambda: mean_over_tasks(fun, one, key, task_chunk)))

    with annotate_errors(
        "`outer_update(state, tasks)`",
        f"{count_tasks(tasks)} tasks, of support {shapes_of(tasks.support)} and query "
        f"{shapes_of(tasks.query)}",
        "a batch of tasks: a leading task axis, then the example axis, then one example as the "
        "model takes it. Of one task: `jax.tree.map(lambda x: x[None], task)`",
        seen=is_one_task,
    ):
        return mean_over_tasks(fun, tasks, key, task_chunk)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, grads: PyTree
) -> TrainState:
    """The state after one step of the outer `optimizer` along `grads`."""
    params, static = eqx.partition(state.model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    return TrainState(state.step + 1, eqx.combine(params, static), opt_state)


def adapt_with_metrics(
    strategy: Strategy, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None
) -> tuple[PyTree, dict[str, Array]]:
    """The adapted model and, where the strategy can tell, the support loss before every step."""
    if can_roll_out(strategy):
        adaptation = strategy.inner_rollout(model, support, key=key)  # pyright: ignore
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


def split_or_none(key: PRNGKeyArray | None) -> tuple[Any, Any]:
    return (None, None) if key is None else tuple(jax.random.split(key))
