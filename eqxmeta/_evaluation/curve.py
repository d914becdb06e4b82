"""Query metrics of a task at every inner step: the compiled part of an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._keys import used_again
from .._model.predict import predict
from .._model.support_statistics import with_support_statistics, without_statistics
from .._strategy.jit import strategy_jit
from .._strategy.metrics import check_loss_output
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy
from .._task.examples import examples
from .._task.layout import is_large
from .._task.mesh import divide, over_devices
from .._task.task import Task
from .tasks import PARALLEL, task_and_key, telling_number


class Measured(NamedTuple):
    """Of one task, or stacked of several.

    - `curves`: query metrics after 0, 1, ..., `steps` inner steps, `[steps + 1]` each.
    - `tells`: see `telling_number`.
    - `outputs`, `targets`, `weights`, `classes`: see `Predictions`; `None` if not asked for.
    """

    curves: dict[str, Array]
    tells: Array
    outputs: PyTree = None
    targets: PyTree = None
    weights: PyTree = None
    classes: PyTree = None


class Point(eqx.Module):
    """A strategy that the compiled program makes of numbers which it is given. Those of the same
    `make` and `strategy`, of other numbers, share one program."""

    strategy: Strategy
    make: Callable[..., Strategy]
    values: dict[str, Array]


@strategy_jit()
def measure_piece(
    strategy: Strategy | Point,
    model: PyTree,
    tasks: Any,
    root: PRNGKeyArray,
    begin: Array,
    size: int,
    steps: int | None,
    predictions: bool,
    mesh: Mesh | None = None,
) -> Measured:
    """Of the tasks of one of the `pieces`, which the devices of `mesh` share."""
    if isinstance(strategy, Point):
        strategy = strategy.make(**strategy.values)
    shared, others = eqx.partition((model, tasks, root, begin), eqx.is_array)

    def one(index: Array, shared: PyTree = shared) -> Measured:
        model, tasks, root, begin = eqx.combine(shared, others)
        task, task_key, key = task_and_key(tasks, root, begin, index)
        curves, outputs = _curve(strategy, model, task, steps, key, predictions)
        tells = telling_number(task)
        if not predictions:
            return Measured(curves, tells)
        classes = tasks.classes(used_again(task_key)) if says_classes(tasks) else None
        _, targets, weights = examples(task.query)
        return Measured(curves, tells, outputs, targets, weights, classes)

    # Traced once: counted, and then computed as it is.
    closed, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.int32(0))
    share = size if mesh is None else -(-size // mesh.size)
    with over_devices(mesh):  # which says on what they compute
        parallel = 1 if is_large(closed) else min(share, PARALLEL)
    batch_size = parallel if parallel > 1 else None
    if mesh is None:
        indices = jnp.arange(size, dtype=jnp.int32)  # as it was traced, also in 64 bits
        values = jax.lax.map(jaxpr_as_fun(closed), indices, batch_size=batch_size)
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    def some(indices: Int[Array, " n"], shared: PyTree) -> Measured:
        return jax.lax.map(lambda index: one(index, shared), indices, batch_size=batch_size)

    # Every device has as many, some the last task once more.
    indices = jnp.minimum(jnp.arange(share * mesh.size, dtype=jnp.int32), size - 1)
    values = divide(some, mesh, results="gathered")(indices, shared)
    return jax.tree.map(lambda x: x[:size], values)


def says_classes(tasks: Any) -> bool:
    """Whether the source says which of its classes a label stands for."""
    return not isinstance(tasks, Task) and hasattr(tasks, "classes")


def adaptation_curve(
    strategy: Strategy, model: PyTree, task: Task, *, steps: int | None, key: PRNGKeyArray | None
) -> dict[str, Array]:
    """Query metrics of one task after 0, 1, ..., `steps` inner steps: `[steps + 1]` each."""
    return _curve(strategy, model, task, steps, key, False)[0]


def _curve(
    strategy: Strategy,
    model: PyTree,
    task: Task,
    steps: int | None,
    key: PRNGKeyArray | None,
    predictions: bool,
) -> tuple[dict[str, Array], PyTree]:
    """`adaptation_curve`, and with `predictions` the adapted model's output for each query."""

    def ready(model: PyTree) -> PyTree:
        model = eqx.nn.inference_mode(model)
        return with_support_statistics(strategy.loss, model, task.support)

    def measure(model: PyTree) -> dict[str, Array]:
        out = strategy.loss(ready(model), task.query, None)
        check_loss_output(out)
        value, metrics = out
        return {"loss": value, **metrics}

    model = without_statistics(model)
    if isinstance(strategy, RolloutStrategy):
        options = {"steps": steps, "observe": measure, "key": key}
        end = strategy.inner_rollout(model, task.support, **options)
        curves, adapted = end.observed, end.model
    else:
        adapted = strategy.inner_adapt(model, task.support, key=key)
        after, unadapted = measure(adapted), strategy.unadapted(model)
        before = (
            jax.tree.map(jnp.zeros_like, after)  # NaN that is meant is made on the host
            if unadapted is None
            else measure(unadapted)
        )
        curves = jax.tree.map(lambda *xs: jnp.stack(xs), before, after)
    if not predictions:
        return curves, None
    x, _, weights = examples(task.query)
    return curves, predict(ready(adapted), x, None, weights)
