"""What can be found wrong with a run before anything is compiled: only shapes are traced."""

from typing import Any

import equinox as eqx
import jax

from .._callback.published import AT_END
from .._errors import annotate_errors, explain
from .._model.state import TrainState
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
            check_loss(strategy, state.model, without_first_axis(tasks.support))
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
    for name in {"step", SKIPPED, AT_END} & metrics.keys():
        message = f"The metrics of {what} use a reserved name."
        raise ValueError(explain(message, repr(name), "another name"))
    before, after = _layout(state), _layout(new)
    if before != after:
        changed = sorted(
            path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
        )
        raise ValueError(
            explain(
                f"{what} changed the structure, a shape or a dtype of the state.",
                "; ".join(f"{path}: {before.get(path)} -> {after.get(path)}" for path in changed),
                "every leaf of the new state as in the old one",
            )
        )
    warn_slow_convolutions(closed)
    return set(metrics)


def _traced(strategy: Strategy, state: TrainState, tasks: Task) -> Any:
    """The jaxpr and the shapes of what it computes, or the error. The training program asks for
    the same trace again, which JAX remembers."""
    try:
        closed, out, _ = eqx.filter_make_jaxpr(strategy.outer_update)(
            state, tasks, key=jax.random.key(0)
        )
    except Exception as error:  # handed on: the loss may have something plainer to say
        return error
    return closed, out


def check_init(strategy: Strategy, state: Any) -> None:
    if not isinstance(state, TrainState):
        message = f"`{type(strategy).__name__}.init` returned something else than a state."
        raise TypeError(explain(message, show(state), "an `eqxmeta.TrainState`"))


def _layout(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path((state.model, state.opt_state))
    names = {0: "model", 1: "opt_state"}
    return {
        names[path[0].idx] + jax.tree_util.keystr(path[1:]): f"{x.dtype.name}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "dtype") and hasattr(x, "shape")
    }
