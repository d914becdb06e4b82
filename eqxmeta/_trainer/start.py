"""What `fit`, `plan` and `fit_seeds` do alike before the first step."""

import jax.numpy as jnp
from jaxtyping import PyTree

from .._errors import annotate_errors
from .._model.check import check_no_nan, warn_duplicates
from .._model.state import TrainState, without_weak_types
from .._preflight.outer_update import check_init
from .._strategy.strategy import Strategy


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
