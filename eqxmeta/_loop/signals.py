"""Ctrl-C and SIGTERM during a run."""

import signal
import threading
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class OnSignal:
    """While active, the first signal `number` calls `stop` instead of doing what it would do at
    whatever line it hits: between a dispatch, which consumes the state, and the assignment of its
    result there is no state to return. From then on the signal has the handler `then`.

    Python allows handlers in the main thread only; elsewhere this does nothing.
    """

    def __init__(self, number: int, stop: Callable[[], None], *, then: Callable[..., Any]):
        self._number = number
        self._stop = stop
        self._then = then
        self._previous: Callable[[int, FrameType | None], object] | int | None = None
        self._active = False
        self._received = False

    def __enter__(self) -> "OnSignal":
        self._received = False
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._previous = signal.getsignal(self._number)
            # A job under `nohup` ignores Ctrl-C, and goes on doing so; a handler that
            # is not Python's (None) could not be put back.
            self._active = self._previous not in (signal.SIG_IGN, None)
        if self._active:
            signal.signal(self._number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            signal.signal(self._number, self._previous)
            # A run within a hook of a run: whoever pressed Ctrl-C meant both.
            outer = getattr(self._previous, "__self__", None)
            if self._received and isinstance(outer, OnSignal):
                self._received = False
                signal.raise_signal(self._number)

    def pass_on(self, error: BaseException | None = None) -> None:
        """After the block: do what the signal would have done. A handler of the user's is called;
        the default, which is to die, is `SystemExit(128 + number)`, so that everybody up to the
        interpreter can clean up, and the shell reads of it what it would have read. An `error` that
        ended the block, which nobody would see then, is printed."""
        if self._received and self._previous == signal.SIG_DFL:
            if error is not None:
                traceback.print_exception(error)
            raise SystemExit(128 + self._number) from error
        if self._received:
            signal.raise_signal(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(number, self._then)
        self._stop()


def on_interrupt(stop: Callable[[], None]) -> OnSignal:
    """The first Ctrl-C calls `stop`, the second one raises `KeyboardInterrupt`."""
    return OnSignal(signal.SIGINT, stop, then=signal.default_int_handler)


def on_termination(stop: Callable[[], None]) -> OnSignal:
    """`kill` and schedulers: SIGTERM calls `stop`. Those who send it may do so several times, and
    have SIGKILL for whoever takes too long."""
    return OnSignal(signal.SIGTERM, stop, then=lambda number, frame: None)
