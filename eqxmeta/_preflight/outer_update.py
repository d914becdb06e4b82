"""What can be found wrong with a run before anything is compiled: only shapes are traced."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh

from .._callback.published import AT_END
from .._errors import annotate_errors, explain, succeeds
from .._jaxpr.flops import equations
from .._model.changes import STATE_EXPECTED, changes
from .._model.state import TrainState
from .._strategy.metrics import SKIPPED, check_scalars, show
from .._strategy.strategy import Strategy
from .._task.mesh import over_devices
from .._task.task import Task, shapes_of
from .loss import check_loss, without_first_axis
from .slow_layers import warn_slow_convolutions
from .untouched import check_untouched


def check_outer_update(
    strategy: Strategy, state: TrainState, tasks: Task, mesh: Mesh | None = None
) -> tuple[set[str], bool]:
    """`strategy.outer_update` must give back the same kind of state, and scalar metrics. Returns
    the names of these, and whether the devices of `mesh` share the tasks: an `outer_update` that
    takes the mean over tasks by itself is right, but computed by every device for every task."""
    what = f"`{type(strategy).__name__}.outer_update`"
    with annotate_errors(what, f"a state and a batch of tasks {shapes_of(tasks)}"):
        try:
            # The training program asks for the same trace again, which JAX remembers.
            trace = eqx.filter_make_jaxpr(strategy.outer_update)
            with over_devices(mesh):
                traced = trace(state, tasks, key=jax.random.key(0))
        except Exception as error:  # raised below, so that what the loss says is not chained to it
            traced = error
        if isinstance(traced, Exception):
            if not jax.tree.leaves(tasks.support):
                _check_support(strategy, state, tasks)
                raise traced
            check_loss(strategy, state.model, without_first_axis(tasks))
            raise traced
    closed, shapes, others = traced
    out = eqx.combine(shapes, others)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        message = f"{what} returned something else than a pair."
        raise TypeError(explain(message, show(out), "(TrainState, metrics)"))
    new, metrics = out
    if not isinstance(metrics, dict):
        message = f"The metrics of {what} are invalid."
        raise TypeError(explain(message, show(metrics), "a dict of scalars"))
    check_scalars(metrics, f"The metrics of {what}")
    for name in {"step", SKIPPED, AT_END} & metrics.keys():
        message = f"The metrics of {what} use a reserved name."
        raise ValueError(explain(message, repr(name), "another name"))
    if changed := changes(state, TrainState(state.step, new.model, new.opt_state)):
        message = f"{what} changed the state's structure, a shape, a dtype or a constant leaf."
        raise ValueError(explain(message, "; ".join(changed), STATE_EXPECTED))
    check_untouched(strategy, state, closed)
    warn_slow_convolutions(closed)
    divided = any(eqn.primitive.name == "shard_map" for eqn in equations(closed.jaxpr))
    return set(metrics), divided


def _check_support(strategy: Strategy, state: TrainState, tasks: Task) -> None:
    """Raises `ValueError` if a support set is all that a step on `tasks`, without one, lacks."""
    whole, key = Task(tasks.query, tasks.query), jax.random.key(0)
    if succeeds(lambda: eqx.filter_eval_shape(strategy.outer_update, state, whole, key=key)):
        message = f"`{type(strategy).__name__}` adapts to a support set, and the tasks have none."
        received = f"tasks of support () and query {shapes_of(tasks.query)}"
        expected = "tasks with both, such as those of `eqxmeta.tasks.Episodes`. Minibatches are "
        expected += "for strategies that do not adapt in training, such as `eqxmeta.Baseline`"
        raise ValueError(explain(message, received, expected))


def check_init(strategy: Strategy, state: Any) -> None:
    if not isinstance(state, TrainState):
        message = f"`{type(strategy).__name__}.init` returned something else than a state."
        raise TypeError(explain(message, show(state), "an `eqxmeta.TrainState`"))
