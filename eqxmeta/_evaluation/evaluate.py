"""Evaluation of a strategy on many tasks, at every inner step."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_int, check_seed
from .._bar import progress
from .._direction import declared_by
from .._errors import annotate_errors, explain, succeeds, warn
from .._model.check import check_model
from .._model.support_statistics import TransductiveLayer, has_layer
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy
from .._task.device_source import is_device_source
from .._task.mesh import Devices, mesh_of, replicated
from .._task.processes import Processes
from .._task.task import Task, label_ranges, shapes_of
from .curve import Measured, Point, adaptation_curve, measure_piece
from .predictions import Predictions
from .result import Evaluation
from .tasks import check_tasks, pieces, task_and_key

# Evaluation tasks are drawn from a stream of their own: the same seed for training and for
# evaluation must not mean the same tasks.
_STREAM = 0x6576616C


def evaluate(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    *,
    num_tasks: int = 600,
    inner_steps: int | None = None,
    seed: int = 0,
    predictions: bool = False,
    devices: Devices = None,
) -> Evaluation:
    """How well `strategy` adapts `model` (a `TrainState.model`; or, as a baseline, one that has no
    parameters) to tasks it has not seen.

    - `tasks`: a task source, `sample(key) -> Task`, of which `num_tasks` tasks are drawn that
      depend on `seed` only (task `i` not even on `num_tasks`); a batch of tasks, which is then
      used as it is; or a host source, of which the first `num_tasks` tasks of `tasks[0]`,
      `tasks[1]`, ... are read. Of a single task there is no interval: `ci95` is NaN.
    - `inner_steps`: adaptation is measured after 0, 1, ..., `inner_steps` inner steps. `None`: as
      many as the strategy trains with. A strategy without inner steps is measured before and
      after.
    - `predictions`: keep what the adapted model predicts for every query, for tasks of examples
      `(x, y)`; then `result.per_class()` tells which classes are hard.
    - `devices`: those that share the tasks, as for `Trainer`.

    The query loss is computed with `eqx.nn.inference_mode`. With the losses of `eqxmeta.losses` no
    prediction depends on the other queries, unless the model has an `eqxmeta.nn.BatchNorm` (the
    result's `transductive` says so); a loss of your own must keep to it by itself.
    Adaptation uses the model as it is (dropout is on). What takes long shows a bar in a terminal.

    Raises `ValueError` or `TypeError` for invalid arguments. Warns (`RuntimeWarning`) if the loss
    of a task with integer labels is NaN, as `cross_entropy` makes it for labels without a logit.
    """
    check_model(model, "evaluate(model=...)", trained=True, baseline=True)
    steps = check_steps(strategy, inner_steps, "evaluate")
    seed = check_seed(seed, "evaluate(seed=...)")
    task, num_tasks = check_tasks(tasks, num_tasks, "evaluate")
    if predictions:
        sound = isinstance(task.query, tuple | list) and len(task.query) in (2, 3)
        expected = "False, or tasks whose query sets are `(x, y)`"
        check_argument(sound, predictions, "evaluate(predictions=...)", expected)
    mesh = mesh_of(devices, "evaluate(devices=...)")
    with progress(num_tasks, "tasks") as advance:
        return measure(
            strategy, model, tasks, task, num_tasks=num_tasks, steps=steps, seed=seed,
            predictions=predictions, advance=advance, mesh=mesh,
        )  # fmt: skip


def measure(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    task: Task,
    *,
    num_tasks: int,
    steps: int | None,
    seed: int,
    predictions: bool = False,
    advance: Callable[[int], object] = lambda tasks: None,
    argument: str = "evaluate(tasks=...)",
    mesh: Mesh | None = None,
    point: Point | None = None,
) -> Evaluation:
    """`evaluate`, of arguments that have been checked. `task`: the shapes of one of `tasks`.
    `advance` is called with numbers of tasks that have been evaluated. `point`: `strategy`, as
    what shares its program with others."""
    root = jax.random.fold_in(jax.random.key(seed), _STREAM)
    processes, found = Processes(mesh), []
    model_there, root_there = replicated((model, root), mesh)
    tasks_there = replicated(tasks, mesh) if is_device_source(tasks) else tasks
    with _annotate(strategy, model, task, tasks):
        for piece, begin, size in pieces(tasks_there, num_tasks, argument):
            processes.agree()  # reading the tasks, or what came before, may have failed in one
            piece, first = replicated((piece, jnp.int32(begin)), mesh)
            measured = measure_piece(
                point or strategy,
                model_there,
                piece,
                root_there,
                first,
                size,
                steps,
                predictions,
                mesh,
            )
            found.append(jax.device_get(measured))
            advance(min(size, num_tasks - begin))
    all_of = jax.tree.map(lambda *xs: np.concatenate(xs)[:num_tasks], *found)
    values = dict(all_of.curves)
    if not isinstance(strategy, RolloutStrategy) and strategy.unadapted(model) is None:
        # NaN that is meant: not on the device, where `jax_debug_nans` looks for what is not.
        for name, x in values.items():
            nothing = np.full_like(x[:, :1], np.nan)
            values[name] = np.concatenate([nothing, x[:, 1:]], axis=1)
    _warn_of_labels(values["loss"][:, -1], pieces(tasks, num_tasks, argument), root)
    return Evaluation(
        values,
        has_layer(model, TransductiveLayer),
        tasks=all_of.tells,
        seed=seed,
        directions=declared_by(strategy),
        predictions=_predictions(all_of, tasks) if predictions else None,
    )


def _predictions(found: Measured, tasks: Any) -> Predictions:
    names = getattr(tasks, "names", None)
    return Predictions(found.outputs, found.targets, found.weights, found.classes, names)


def _warn_of_labels(loss: np.ndarray, pieces: Iterable[Any], root: PRNGKeyArray) -> None:
    bad = np.flatnonzero(np.isnan(loss))
    if not len(bad):
        return
    number = int(bad[0])
    piece, begin = next((p, begin) for p, begin, size in pieces if number < begin + size)
    task, *_ = task_and_key(piece, root, jnp.int32(begin), jnp.int32(number - begin))
    if ranges := label_ranges(task, "task", ndim=1):
        message = f"The evaluation is NaN for {len(bad)} of {len(loss)} tasks."
        expected = "labels in range(classes), with a logit for each class; and a finite model"
        warn(explain(message, f"{ranges}, of task {number}", expected))


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
