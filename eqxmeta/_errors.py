"""What the user is told: errors, the one shape that their messages have, warnings, lines."""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import jax


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


class Unfailing:
    """A text stream, or `None`, whose failures are ignored. Its reader may have gone (broken pipe,
    closed file), or its encoding lack a letter: then the text is lost, and the run is not."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        return self._stream == getattr(other, "_stream", other)  # tqdm asks which one it is

    def isatty(self) -> bool:
        with suppress(Exception):
            return self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        with suppress(Exception):
            try:
                self._stream.write(text)
            except UnicodeError:
                self._stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()


def tell(text: object, stream: Any = None) -> None:
    """Print a line, on stdout unless said otherwise. Never raises, but for an interrupt."""
    print(text, file=Unfailing(stream or sys.stdout), flush=True)


_keep_running: ContextVar[bool] = ContextVar("keep_running", default=False)


@contextmanager
def warnings_end_nothing() -> Iterator[None]:
    """In the block our warnings are printed on stderr where a filter of the user's (`python -W
    error`) would turn them into errors, which would lose a run that got so far."""
    token = _keep_running.set(True)
    try:
        yield
    finally:
        _keep_running.reset(token)


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warns at the user's own line, however deep in the library the reason was found."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").split(".")[0] == "eqxmeta":
        level += 1
    try:
        warnings.warn(message, category, stacklevel=level + 1)
    except Exception as error:  # as a filter asks, or because there is no stderr to write to
        if isinstance(error, category) and not _keep_running.get():
            raise
        tell(f"{category.__name__}: {message}", sys.stderr)


# JAX's own, where a tracer meets code that wants numbers.
_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def advice(
    error: Exception, otherwise: str = "a result; why there is none, the error itself says"
) -> str:
    """What is expected where an error came out of the user's code, judged by the error's type."""
    if isinstance(error, _NOT_TRACEABLE):
        return (
            "code that JAX can trace for these shapes: arrays in `jax.numpy`, no Python number "
            "made of them and no `if` on their values"
        )
    return otherwise


@contextmanager
def annotate_errors(
    whose: str,
    received: object,
    expected: str = "",
    *,
    seen: Callable[[Exception], bool] = lambda error: False,
) -> Iterator[None]:
    """Around the user's own code: its errors keep their type, and get a note of where they are from
    unless they have three parts already.

    `expected` is told only where `seen(error)` finds that its absence is the reason."""
    try:
        yield
    except Exception as error:
        if not _is_told(error):
            expected = expected if seen(error) else advice(error)
            error.add_note(explain(f"This error came out of {whose}.", received, expected))
        raise


def has_no_such_part(error: Exception) -> bool:
    """Whether a function from a model to a part of it asked for one that is not there."""
    return isinstance(error, AttributeError | LookupError | TypeError)


def add_note(error: Exception, invalid: str, received: object, expected: str) -> None:
    """Three parts for an error that has none yet, neither as its message nor as a note."""
    if not _is_told(error):
        error.add_note(explain(invalid, received, expected))


def _is_told(error: Exception) -> bool:
    told = [str(error), *getattr(error, "__notes__", [])]
    return any("\nReceived: " in text for text in told)


def succeeds(attempt: Callable[[], object]) -> bool:
    """Whether it does: a suspected reason of an error is tried before it is told."""
    try:
        attempt()
    except Exception:
        return False
    return True


def need(module: str, caller: str, extra: str) -> Any:
    """The imported `module`, of an optional dependency. Raises `ImportError` that says what to
    install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package, _, _ = module.partition(".")
        if (error.name or "").split(".")[0] != package:  # installed, and lacks what it needs itself
            raise
        message = f"`{caller}` needs a package that is not installed."
        expected = f"pip install 'eqxmeta[{extra}]'"
        raise ImportError(explain(message, f"no {package}", expected)) from error


def takes(function: Any, *args: str, **kwargs: str) -> bool:
    """Whether such a call would fit the signature of `function`, if it has one."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except ValueError:  # some built-in callables have none
        return True
    except TypeError:
        return False
    return True


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
    """Another run is writing to the folder, or may be: it is not the one that this run locked."""


def in_use(what: object, received: str) -> CheckpointInUse:
    expected = (
        "a folder for each run, in which nobody moves or replaces anything until it has ended"
    )
    return CheckpointInUse(explain(f"{what} is in use.", received, expected))


class CheckpointTooNew(CheckpointError):
    """The file was written by a newer eqxmeta, in a format that this one does not know."""
