"""What can be found wrong with a run before anything is compiled: only shapes are traced."""

from typing import Any

import equinox as eqx
import jax

from .._errors import annotate_errors, explain
from .._model.state import STATE_EXPECTED, TrainState, changes
from .._strategy.metrics import SKIPPED, check_scalars, show
from .._strategy.strategy import Strategy
from .._task.task import Task, shapes_of
from .loss import check_loss, without_first_axis
from .slow_layers import warn_slow_convolutions


def check_outer_update(strategy: Strategy, state: TrainState, tasks: Task) -> set[str]:
    """`strategy.outer_update` must give back the same kind of state, and scalar metrics, whose
    names are returned."""
    what = f"`{type(strategy).__name__}.outer_update`"
    with annotate_errors(what, f"a state and a batch of tasks {shapes_of(tasks)}"):
        traced = _traced(strategy, state, tasks)
        if isinstance(traced, Exception):
            check_loss(strategy, state.model, without_first_axis(tasks))
            raise traced
    closed, out = traced
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        received = show(out)
        expected = "(TrainState, metrics)"
        raise TypeError(explain(f"{what} returned something else than a pair.", received, expected))
    new, metrics = out
    if not isinstance(metrics, dict):
        raise TypeError(
            explain(f"The metrics of {what} are invalid.", show(metrics), "a dict of scalars")
        )
    check_scalars(metrics, f"The metrics of {what}")
    for name in {"step", SKIPPED} & metrics.keys():
        message = f"The metrics of {what} use a reserved name."
        raise ValueError(explain(message, repr(name), "another name"))
    if changed := changes(state, TrainState(state.step, new.model, new.opt_state)):
        raise ValueError(
            explain(
                f"{what} changed the structure of the state, a shape, a dtype, or a leaf that is "
                "no array.",
                "; ".join(changed),
                STATE_EXPECTED,
            )
        )
    warn_slow_convolutions(closed)
    return set(metrics)


def _traced(strategy: Strategy, state: TrainState, tasks: Task) -> Any:
    """The jaxpr and the shapes of what it computes, or the error. The training program asks for
    the same trace again, which JAX remembers."""
    try:
        closed, shapes, others = eqx.filter_make_jaxpr(strategy.outer_update)(
            state, tasks, key=jax.random.key(0)
        )
    except Exception as error:  # handed on: the loss may have something plainer to say
        return error
    return closed, eqx.combine(shapes, others)


def check_init(strategy: Strategy, state: Any) -> None:
    if not isinstance(state, TrainState):
        message = f"`{type(strategy).__name__}.init` returned something else than a state."
        raise TypeError(explain(message, show(state), "an `eqxmeta.TrainState`"))
