"""What can be found wrong with a run before anything is compiled: only shapes are traced."""

from typing import Any

import equinox as eqx
import jax

from .._errors import explain, tracing
from .._model.state import TrainState
from .._strategy.strategy import Strategy
from .._task.task import Task, shapes_of
from .loss import check_scalars, show
from .slow_layers import warn_slow_convolutions


def check_outer_update(strategy: Strategy, state: TrainState, tasks: Task) -> set[str]:
    """`strategy.outer_update` must give back the same kind of state, and scalar metrics, whose
    names are returned."""
    what = f"`{type(strategy).__name__}.outer_update`"
    with tracing(what, f"a state and a batch of tasks {shapes_of(tasks)}"):
        closed, out, _ = eqx.filter_make_jaxpr(
            lambda s, t: strategy.outer_update(s, t, key=jax.random.key(0))
        )(state, tasks)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise TypeError(
            explain(
                f"{what} returned something else than a pair.", show(out), "(TrainState, metrics)"
            )
        )
    new, metrics = out
    if not isinstance(metrics, dict):
        raise TypeError(
            explain(f"The metrics of {what} are invalid.", show(metrics), "a dict of scalars")
        )
    check_scalars(metrics, f"The metrics of {what}")
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


def check_init(strategy: Strategy, state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            explain(
                f"`{type(strategy).__name__}.init` returned something else than a state.",
                show(state),
                "an `eqxmeta.TrainState`",
            )
        )


def _layout(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path((state.model, state.opt_state))
    names = {0: "model", 1: "opt_state"}
    return {
        names[path[0].idx] + jax.tree_util.keystr(path[1:]): f"{x.dtype.name}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "dtype") and hasattr(x, "shape")
    }
