"""Evaluation of a strategy on many tasks, at every inner step."""

from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_int, check_seed
from .._errors import annotate_errors, explain, succeeds, warn
from .._model.check import check_model
from .._model.support_statistics import (
    TransductiveLayer,
    has_layer,
    with_support_statistics,
    without_statistics,
)
from .._strategy.jit import strategy_jit
from .._strategy.metrics import check_loss_output
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy
from .._task.device_source import check_device_source, check_task, sample
from .._task.layout import is_large
from .._task.task import Task, count_tasks, label_ranges, shapes_of
from .result import Evaluation

# Evaluation tasks are drawn from a stream of their own: the same seed for training and for
# evaluation must not mean the same tasks.
_STREAM = 0x6576616C

# Small tasks evaluated in parallel; the rest wait their turn inside the compiled program.
_PARALLEL = 100


def evaluate(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    *,
    num_tasks: int = 600,
    inner_steps: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """How well `strategy` adapts `model` (a `TrainState.model`; or, as a baseline, one that has no
    parameters) to tasks it has not seen.

    - `tasks`: a task source, `sample(key) -> Task`, of which `num_tasks` tasks are drawn that
      depend on `seed` only (task `i` not even on `num_tasks`); or a batch of tasks, which is then
      used as it is. Of a single task there is no interval: `ci95` is NaN.
    - `inner_steps`: adaptation is measured after 0, 1, ..., `inner_steps` inner steps. `None`: as
      many as the strategy trains with. A strategy without inner steps is measured before and
      after.

    The query loss is computed with `eqx.nn.inference_mode`. With the losses of `eqxmeta.losses` no
    prediction depends on the other queries, unless the model has an `eqxmeta.nn.BatchNorm` (the
    result's `transductive` says so); a loss of your own must keep to it by itself.
    Adaptation uses the model as it is (dropout is on).

    Raises `ValueError` or `TypeError` for invalid arguments. Warns (`RuntimeWarning`) if the loss
    of a task with integer labels is NaN, as `cross_entropy` makes it for labels without a logit.
    """
    check_model(model, "evaluate(model=...)", trained=True, baseline=True)
    steps = check_steps(strategy, inner_steps, "evaluate")
    seed = check_seed(seed, "evaluate(seed=...)")
    task = check_tasks(tasks, "evaluate(tasks=...)")
    if isinstance(tasks, Task):
        num_tasks = count_tasks(tasks)
    num_tasks = check_int(num_tasks, "evaluate(num_tasks=...)", minimum=1, what="tasks")
    return measure(strategy, model, tasks, task, num_tasks=num_tasks, steps=steps, seed=seed)


def measure(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    task: Task,
    *,
    num_tasks: int,
    steps: int | None,
    seed: int,
) -> Evaluation:
    """`evaluate`, of arguments that have been checked. `task`: the shapes of one of `tasks`."""
    root = jax.random.fold_in(jax.random.key(seed), _STREAM)
    with _annotate(strategy, model, task, tasks):
        values = jax.device_get(_evaluate(strategy, model, tasks, root, num_tasks, steps))
        if not isinstance(strategy, RolloutStrategy) and strategy.unadapted(model) is None:
            # NaN that is meant: not on the device, where `jax_debug_nans` looks for what is not.
            for name, x in values.items():
                nothing = np.full_like(x[:, :1], np.nan)
                values[name] = np.concatenate([nothing, x[:, 1:]], axis=1)
    _warn_of_labels(values["loss"][:, -1], tasks, root)
    return Evaluation(values, has_layer(model, TransductiveLayer))


def _warn_of_labels(loss: np.ndarray, tasks: Any, root: PRNGKeyArray) -> None:
    bad = np.flatnonzero(np.isnan(loss))
    if not len(bad):
        return
    task, _ = _task_and_key(tasks, root, jnp.int32(bad[0]))
    if ranges := label_ranges(task, "task", ndim=1):
        message = f"The evaluation is NaN for {len(bad)} of {len(loss)} tasks."
        expected = "labels in range(classes), with a logit for each class; and a finite model"
        warn(explain(message, f"{ranges}, of task {bad[0]}", expected))


def check_tasks(tasks: Any, argument: str) -> Task:
    """The shapes of one of the tasks to evaluate on. Raises `TypeError` or `ValueError`."""
    if not isinstance(tasks, Task):
        expected = (
            "an `eqx.Module` with `sample(key) -> Task`, or a batch of tasks. A host "
            "source is evaluated on one of its batches: `tasks[0]`"
        )
        sound, fault = not hasattr(tasks, "__getitem__"), "is not a source of single tasks"
        check_argument(sound, tasks, argument, expected, TypeError, fault)
        return check_device_source(tasks, argument)
    check_task(tasks, argument, leading="task")
    shapes = [leaf.shape for leaf in jax.tree.leaves(tasks)]
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) != 1:
        received = f"{sizes} tasks in its arrays, of shapes {shapes}"
        expected = "a leading task axis in every array, and then, if of examples, the example axis"
        raise ValueError(explain(f"`{argument}` is not a batch of tasks.", received, expected))
    return jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x)[0], tasks))


def check_curve(
    strategy: Strategy, model: PyTree, task: Task, steps: int | None
) -> tuple[str, ...]:
    """The metrics of such a task's evaluation, which must be traceable. Nothing is compiled."""

    def curve(model: PyTree, task: Task) -> dict[str, Array]:
        return adaptation_curve(strategy, model, task, steps=steps, key=jax.random.key(0))

    with _annotate(strategy, model, task):
        return tuple(eqx.filter_eval_shape(curve, model, task))


def _annotate(
    strategy: Strategy, model: PyTree, task: Task, tasks: Any = None
) -> AbstractContextManager[None]:
    def is_one_task(error: Exception) -> bool:  # which may look like a batch
        def curve(model: PyTree, task: Task) -> dict[str, Array]:
            return adaptation_curve(strategy, model, task, steps=None, key=None)

        one = isinstance(tasks, Task)
        return one and succeeds(lambda: eqx.filter_eval_shape(curve, model, tasks))

    return annotate_errors(
        "the evaluation, of `inner_adapt(model, support)` and `loss(model, query, None)`",
        f"{type(model).__name__}, support {shapes_of(task.support)}, query {shapes_of(task.query)}",
        "a batch of tasks, with a leading task axis. Of one task: "
        "`jax.tree.map(lambda x: x[None], task)`",
        seen=is_one_task,
    )


@strategy_jit()
def _evaluate(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    root: PRNGKeyArray,
    num_tasks: int,
    steps: int | None,
) -> dict[str, Array]:
    def one(index: Array) -> dict[str, Array]:
        task, key = _task_and_key(tasks, root, index)
        return adaptation_curve(strategy, model, task, steps=steps, key=key)

    # Traced once: counted, and then computed as it is.
    closed, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.int32(0))
    parallel = 1 if is_large(closed) else min(num_tasks, _PARALLEL)
    indices = jnp.arange(num_tasks, dtype=jnp.int32)  # as it was traced, also in 64 bits
    batch_size = parallel if parallel > 1 else None
    values = jax.lax.map(jaxpr_as_fun(closed), indices, batch_size=batch_size)
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _task_and_key(tasks: Any, root: PRNGKeyArray, index: Array) -> tuple[Task, PRNGKeyArray]:
    """Task `index`, and the key for adapting to it."""
    task_key, key = jax.random.split(jax.random.fold_in(root, index))
    if isinstance(tasks, Task):
        return jax.tree.map(lambda x: x[index], tasks), key
    return sample(tasks, task_key), key


def adaptation_curve(
    strategy: Strategy, model: PyTree, task: Task, *, steps: int | None, key: PRNGKeyArray | None
) -> dict[str, Array]:
    """Query metrics of one task after 0, 1, ..., `steps` inner steps: `[steps + 1]` each."""

    def measure(model: PyTree) -> dict[str, Array]:
        model = eqx.nn.inference_mode(model)
        model = with_support_statistics(strategy.loss, model, task.support)
        out = strategy.loss(model, task.query, None)
        check_loss_output(out)
        value, metrics = out
        return {"loss": value, **metrics}

    model = without_statistics(model)
    if isinstance(strategy, RolloutStrategy):
        options = {"steps": steps, "observe": measure, "key": key}
        return strategy.inner_rollout(model, task.support, **options).observed
    after = measure(strategy.inner_adapt(model, task.support, key=key))
    unadapted = strategy.unadapted(model)
    before = (
        jax.tree.map(jnp.zeros_like, after)  # see `measure`
        if unadapted is None
        else measure(unadapted)
    )
    return jax.tree.map(lambda *xs: jnp.stack(xs), before, after)


def with_num_inner_steps(strategy: Strategy, steps: int, argument: str = "inner_steps") -> Strategy:
    """The same strategy, taking `steps` inner steps in `inner_adapt`. Raises `ValueError`, naming
    `argument`, for a strategy without inner steps."""
    if not isinstance(strategy, RolloutStrategy):
        message = f"`{argument}` has no effect: the strategy has no inner steps."
        expected = "a `RolloutStrategy`, or `inner_steps` left out"
        raise ValueError(explain(message, f"{steps}, and `{type(strategy).__name__}`", expected))
    return eqx.tree_at(lambda s: s.inner.steps, strategy, steps)


def check_steps(strategy: Strategy, steps: int | None, caller: str) -> int | None:
    """The number of inner steps to measure, if it can be chosen. Raises `TypeError` for what is
    not a strategy, and for what is not a number of steps; `ValueError` for others."""
    sound, argument = isinstance(strategy, Strategy), f"{caller}(strategy=...)"
    check_argument(sound, strategy, argument, "an instance of `Strategy`", TypeError)
    if steps is None:
        return strategy.num_inner_steps()
    argument = f"{caller}(inner_steps=...)"
    steps = check_int(steps, argument, minimum=1, what="inner steps, or None")
    with_num_inner_steps(strategy, steps, argument)
    return steps
