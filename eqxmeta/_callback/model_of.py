"""Which model of a state is meant, where it is another than `state.model`: an average, say."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .._arguments import check_argument
from .._errors import annotate_errors
from .._model.state import TrainState


def check_model_of(choose: Any, argument: str) -> None:
    """Raises `TypeError` unless it can be called with a state, or is `None`."""
    expected = "a function from a `TrainState` to a model, or None: `lambda state: ...`"
    check_argument(choose is None or callable(choose), choose, argument, expected, TypeError)


def model_of(
    state: TrainState, choose: Callable[[TrainState], PyTree] | None, argument: str
) -> PyTree:
    """`choose(state)`, or `state.model`. What it raises gets a note that names `argument`."""
    if choose is None:
        return state.model
    with annotate_errors(f"`{argument}`", f"a `TrainState` after step {int(state.step)}"):
        return choose(state)
