"""The errors that eqxmeta raises, and the one shape that their messages have."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def explain(invalid: str, received: object, expected: str) -> str:
    """Three parts: what is invalid, what was received, what was expected. Whatever was in a file
    cannot write over the terminal: see `printable`."""
    lines = f"{invalid}\nReceived: {received}\nExpected: {expected}".split("\n")
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """`text` in one line, with escapes for what a terminal obeys or cannot show: control
    characters, marks of direction, halves of surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """A warning at the line of the user's that led here, however deep it is below."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").split(".")[0] == "eqxmeta":
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)


_TRACEABLE = (
    "code that JAX can trace for these shapes: arrays in `jax.numpy`, no Python number made of "
    "them and no `if` on their values"
)


@contextmanager
def annotate_errors(whose: str, received: object, expected: str = _TRACEABLE) -> Iterator[None]:
    """Around the user's own code. Its errors stay what they are, with a note of where they are
    from; ours, which say so themselves, and those with a note from further inside pass."""
    try:
        yield
    except Exception as error:
        add_note(error, f"This error came out of {whose}.", received, expected)
        raise


def add_note(error: Exception, invalid: str, received: object, expected: str) -> None:
    """Three parts for an error that has none yet, neither as its message nor as a note."""
    told = [str(error), *getattr(error, "__notes__", [])]
    if not any("\nReceived: " in text for text in told):
        error.add_note(explain(invalid, received, expected))


class NonFiniteError(FloatingPointError):
    """A metric or a parameter became NaN or infinite during training.

    - `step`: the outer step at which it did (1 is the first).
    - `name`: the metric, or the array of the state such as `model.layers[0].weight`.
    - `state`: the last good `TrainState`, that after step `step - 1`. (With
      `Trainer(on_non_finite="skip")`, which gives up after too many steps in a row that were not
      taken: that after step `step`, with the parameters before them.)
    """

    def __init__(self, message: str, *, step: int, name: str, state: Any):
        super().__init__(message)
        self.step = step
        self.name = name
        self.state = state


class CheckpointError(Exception):
    """Base of everything that can be wrong with a checkpoint."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CheckpointCorrupt(CheckpointError):
    """The file is damaged: its bytes do not match its own manifest."""


class CheckpointMismatch(CheckpointError):
    """The file is sound, but belongs to another model, strategy or configuration."""


class CheckpointInUse(CheckpointError):
    """Another run is writing to the folder."""


class CheckpointTooNew(CheckpointError):
    """The file was written by a newer eqxmeta, in a format that this one does not know."""
