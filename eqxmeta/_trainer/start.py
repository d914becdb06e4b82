"""What `fit`, `plan` and `fit_seeds` do alike before the first step, and processes do together."""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import PyTree

from .._callback.callback import Callback, name_of
from .._callback.run import Settings
from .._errors import annotate_errors, explain
from .._model.check import check_no_nan, warn_duplicates
from .._model.state import TrainState, without_weak_types
from .._preflight.outer_update import check_init
from .._strategy.strategy import Strategy
from .._task.processes import Processes


def initial_state(strategy: Strategy, model: PyTree, argument: str) -> TrainState:
    """The state before the first step; `argument` is where `model` was given."""
    check_no_nan(model, argument)
    warn_duplicates(model, argument)
    with annotate_errors(f"`{type(strategy).__name__}.init(model)`", type(model).__name__):
        state = strategy.init(model)
    check_init(strategy, state)
    # The step is the trainer's; weak types would make a second program after the first step.
    state = TrainState(jnp.zeros((), jnp.int32), state.model, state.opt_state)
    return without_weak_types(state)


def check_the_same(settings: Settings, callbacks: Iterable[Callback], processes: Processes) -> None:
    """Raises `ValueError` if `fit` was called otherwise than in process 0: each would wait for what
    the other never does."""
    if not processes.several:
        return
    here = {name: str(x) for name, x in settings.config.items() if name != "fingerprint"} | {
        "callbacks": ", ".join(map(name_of, callbacks)),
        "every": str(dict(settings.everys)),
        "on_non_finite": settings.on_non_finite,
    }
    there = processes.from_first(here)
    if differ := [name for name in here if here[name] != there[name]]:
        message = "`fit` was called differently in the processes of the run."
        received = "; ".join(f"{n}: {here[n]}, and {there[n]} in process 0" for n in differ)
        raise ValueError(explain(message, received, "the same arguments in every process"))
