"""What a strategy is: how a model adapts, and how it learns to."""

import abc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._errors import annotate_errors, explain
from .._meta_gradient.inner_loop import Adaptation
from .._meta_gradient.modes import uphill
from .._model.state import TrainState, init_state
from .._model.support_statistics import with_support_statistics
from .._task.layout import OverTasks, TaskChunk, check_task_chunk, mean_over_tasks
from .._task.task import Task, check_batch, count_tasks, shapes_of
from .._types import Loss, Metrics

# What `outer_update` adds to the metrics of the user's loss.
RESERVED = ("loss", "loss_before", "loss_after", "pooled_loss", "grad_norm", "step")


class Strategy(eqx.Module):
    """A meta-algorithm: how a model adapts to a task, and how it learns to from many tasks.

    Every strategy works without a `Trainer`:

        state = strategy.init(model)
        state, metrics = strategy.outer_update(state, tasks, key=key)
        adapted = strategy.inner_adapt(state.model, support)

    To write your own, subclass `GradientStrategy` if the outer step descends a gradient of the
    query loss, this class otherwise. Decorate both methods with `eqx.filter_jit`.
    """

    @abc.abstractmethod
    def init(self, model: PyTree) -> TrainState:
        """State before the first outer step, for the user's `model`."""

    @abc.abstractmethod
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        """A model of the user's own type, adapted to one task's `support` examples.

        `model` is what `TrainState.model` holds; `key` is for dropout.
        """

    def unadapted(self, model: PyTree) -> PyTree | None:
        """The model as it is before it adapts, of the user's own type: what step 0 of an evaluation
        and `loss_before` measure. `None` if there is nothing that predicts before it has adapted.

        `model` is what `TrainState.model` holds. A strategy for which that is not the user's own
        model, from which tasks start, says here what is.
        """
        return model

    @abc.abstractmethod
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        """One outer step on a batch of tasks (leading axis: tasks), and scalar metrics of it."""


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

    Metrics: `loss` (query loss after adaptation), `loss_before` (before, if
    there is anything before), `grad_norm`, those that
    the loss reports (after, and as `<name>_before`), and `support_loss/<i>` for every inner step
    if the subclass also has `inner_rollout`.
    """

    loss: eqx.AbstractVar[Loss]
    optimizer: eqx.AbstractVar[optax.GradientTransformation]
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def __check_init__(self):
        check_task_chunk(self.task_chunk, f"{type(self).__name__}(task_chunk=...)")

    def init(self, model: PyTree) -> TrainState:
        return init_state(self.meta_model(model), self.optimizer)

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

        return descend(task_loss, self.optimizer, state, tasks, key=key, task_chunk=self.task_chunk)


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
    check_outer_arguments(state, tasks)
    params, static = eqx.partition(state.model, eqx.is_inexact_array)

    def meta_gradient(over_chunk: OverTasks) -> PyTree:
        def meta_loss(params: PyTree) -> tuple[Float[Array, ""], dict[str, Array]]:
            def one(task: Task, key: PRNGKeyArray | None):
                return task_loss(eqx.combine(params, static), task, key)

            return jax.tree.map(lambda x: jnp.mean(x, axis=0), over_chunk(one))

        return jax.value_and_grad(meta_loss, has_aux=True)(params)

    with annotate_batch_errors(tasks):
        (loss, metrics), grads = mean_over_tasks(meta_gradient, tasks, key, task_chunk)
    metrics = {"loss": loss, **by_step(metrics), "grad_norm": optax.tree.norm(grads)}
    return apply_gradient(optimizer, state, uphill(grads)), metrics


def check_outer_arguments(state: Any, tasks: Any) -> None:
    """What `outer_update` was given, by whoever calls it without a trainer."""
    if not isinstance(state, TrainState):
        raise TypeError(
            explain(
                "`outer_update(state, ...)` is not a state.",
                type(state).__name__,
                "a `TrainState`, as `strategy.init(model)` gives it",
            )
        )
    check_batch(tasks, "outer_update(..., tasks)")


def annotate_batch_errors(tasks: Task) -> AbstractContextManager[None]:
    """Around what the user's code does with a batch of tasks: a single task may look like one."""
    return annotate_errors(
        "`outer_update(state, tasks)`",
        f"{count_tasks(tasks)} tasks, of support {shapes_of(tasks.support)} and query "
        f"{shapes_of(tasks.query)}",
        "a batch of tasks: a leading task axis, then the example axis, then one example as the "
        "model takes it. Of one task: `jax.tree.map(lambda x: x[None], task)`",
    )


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, grads: PyTree
) -> TrainState:
    """The state after one step of the outer `optimizer` along `grads`."""
    params, static = eqx.partition(state.model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    return TrainState(state.step + 1, eqx.combine(params, static), opt_state)


def query_loss(
    loss: Loss, unadapted: PyTree | None, adapted: PyTree, task: Task, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Query loss after adaptation, and the metrics of before (unless `None`) and after."""

    def on_query(model: PyTree) -> tuple[Float[Array, ""], Metrics]:
        return loss(with_support_statistics(loss, model, task.support, key=key), task.query, key)

    after, metrics_after = on_query(adapted)
    check_metrics(metrics_after)
    if unadapted is None:
        return after, metrics_after
    # Stopped at its input, so that nothing of it is kept for the backward pass.
    before, metrics_before = on_query(stop_gradient(unadapted))
    metrics = {"loss_before": before, **metrics_after}
    return after, metrics | {f"{name}_before": value for name, value in metrics_before.items()}


def adapt_with_metrics(
    strategy: Strategy, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None
) -> tuple[PyTree, dict[str, Array]]:
    """The adapted model and, where the strategy can tell, the support loss at every step."""
    if not can_roll_out(strategy):
        adapted = strategy.inner_adapt(model, support, key=key)
        _check_adapted(strategy, model, adapted)
        return adapted, {}
    adaptation = strategy.inner_rollout(model, support, key=key)  # pyright: ignore
    return adaptation.model, support_losses(adaptation)


def _check_adapted(strategy: Strategy, model: PyTree, adapted: Any) -> None:
    """That a strategy of the user's own gives a model, not something that has one among it."""
    containers = tuple | list | dict | jax.Array | None
    same = type(adapted) is type(strategy.unadapted(model))
    if isinstance(adapted, containers) and not same:
        parts = ", ".join(type(x).__name__ for x in adapted) if isinstance(adapted, tuple) else ""
        raise TypeError(
            explain(
                f"`{type(strategy).__name__}.inner_adapt` returned something else than a model.",
                f"{type(adapted).__name__}({parts})" if parts else type(adapted).__name__,
                "the adapted model alone",
            )
        )


def support_losses(adaptation: Adaptation) -> dict[str, Float[Array, " steps"]]:
    """The loss that each inner step descended; `by_step` names them."""
    return {"support_loss": adaptation.losses}


def by_step(metrics: Mapping[str, Array]) -> Metrics:
    """`support_loss: [steps]` as `support_loss/0`, `support_loss/1`, ...

    As late as possible: one array goes through the derivatives and the mean over tasks, where
    hundreds of scalars would make the program large and slow to compile.
    """
    scalars: Metrics = {}
    for name, value in metrics.items():
        named = [(name, value)] if value.ndim == 0 else _numbered(name, value)
        scalars.update(named)
    return scalars


def _numbered(name: str, values: Array) -> list[tuple[str, Array]]:
    return [(f"{name}/{i}", value) for i, value in enumerate(jnp.unstack(values))]


def can_roll_out(strategy: Strategy) -> bool:
    """Whether the strategy's `inner_rollout`, if it has one, does what its `inner_adapt` does.

    `inner_rollout(model, support, *, key=None, steps=None, observe=None) -> Adaptation` is the
    optional method by which a strategy shows its inner steps as it takes them. A subclass that
    replaces `inner_adapt` alone has made the inherited one wrong.
    """
    for cls in type(strategy).__mro__:
        if "inner_rollout" in vars(cls):
            return True
        if "inner_adapt" in vars(cls):
            return False
    return False


def stop_gradient(model: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, model)


def split_or_none(key: PRNGKeyArray | None) -> tuple[Any, Any]:
    return (None, None) if key is None else tuple(jax.random.split(key))


def check_metrics(metrics: Mapping[str, Any]) -> None:
    clash = [
        name
        for name in metrics
        if name in RESERVED
        or name == "support_loss"
        or name.startswith("support_loss/")
        or (name.endswith("_before") and name.removesuffix("_before") in metrics)
    ]
    if clash:
        raise ValueError(
            explain(
                "The loss reports a metric under a reserved name.",
                clash,
                f"names other than {RESERVED}",
            )
        )
    for name, value in metrics.items():
        if jnp.shape(value) != ():
            received = f"{name!r} of shape {jnp.shape(value)}"
            raise ValueError(
                explain("A metric of the loss is not a scalar.", received, "means over examples")
            )
