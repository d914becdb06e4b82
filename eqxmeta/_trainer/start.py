"""What `fit`, `plan` and `fit_seeds` do alike before the first step."""

from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from .._errors import tracing
from .._model.check import check_no_nan
from .._model.state import TrainState, without_weak_types
from .._preflight.loss import check_loss, with_labels
from .._preflight.outer_update import check_init
from .._strategy.strategy import Strategy
from .._task.device_source import is_device_source
from .._task.source import Source, open_source
from .._task.task import Task


def initial_state(strategy: Strategy, model: PyTree, argument: str) -> TrainState:
    """The state before the first step; `argument` is where `model` was given."""
    check_no_nan(model, argument)
    with tracing(f"`{type(strategy).__name__}.init(model)`", type(model).__name__):
        state = strategy.init(model)
    check_init(strategy, state)
    # The step is the trainer's; weak types would make a second program after the first step.
    state = TrainState(jnp.zeros((), jnp.int32), state.model, state.opt_state)
    return without_weak_types(state)


def open_tasks(
    tasks: Any,
    meta_batch_size: int,
    strategy: Strategy,
    state: TrainState,
    *,
    start: int = 0,
    steps: int,
) -> AbstractContextManager[Source]:
    """The source of a run's tasks, which are checked against the strategy's loss."""

    def check(task: Task) -> None:
        known = with_labels(tasks, task) if is_device_source(tasks) else task
        check_loss(strategy, state.model, known)

    return open_source(tasks, meta_batch_size, check, start=start, steps=steps)
