"""Ctrl-C and SIGTERM during a run: what they end, and how soon."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from .._callback.run import TERMINATED
from .._files.patience import asked, hurried, hurry
from .announce import Activity, Clock, Show, announcement
from .leave import leave, leave_at_once
from .speaker import Speaker, say

INTERRUPTED = "interrupted"
_REASONS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}

# By this signal the speaker's thread wakes the main thread. It is ignored by default, and hardly
# used for anything else (Go's runtime uses it for the same purpose).
_WAKE = signal.SIGURG

# Before anything has begun SIGTERM ends the process after so many seconds even if the main thread,
# inside a library, does not react.
_UNRESPONSIVE = 2.0


class Overdue(KeyboardInterrupt):
    """Raised where the main thread is, in what has taken too long since the run was to end."""


class NothingBegun(SystemExit, KeyboardInterrupt):
    """Ctrl-C before the first step: a script that does not catch it ends with 130, in silence."""


class _Stretch(NamedTuple):
    """What the main thread is doing: when that began, and how many seconds it is given once the run
    is to end. 0: it ends with the signal. Infinity: nothing is raised in it."""

    limit: float = math.inf
    began: float = 0.0

    def due(self) -> float:
        # What begins after the signal gets a quarter.
        return max(asked() + self.limit, self.began + self.limit / 4)


class Signals:
    """While active, the first of each signal calls `stop(reason)` instead of doing what it would do
    at whatever line it hits: between a dispatch, which consumes the state, and the assignment of
    its result there is no state to return. A second Ctrl-C raises `KeyboardInterrupt`; of SIGTERM
    there may be several: its senders have SIGKILL for a process that takes too long.

    What happens is said at once, on stderr. After the block SIGTERM does what it would have done: a
    handler of the user's is called; the default, which is to die, becomes `SystemExit(143)`, so
    that every `finally` up to the interpreter runs and the shell sees the same exit status.

    Python allows handlers in the main thread only; in another this only says what takes long.

    - `stop`: to be assigned, once there is something to stop.
    - `begun`: whether there is something to lose. Until `begin` is called a signal ends the process
      at once.
    - `activity`, `show`: what may take long, and a bar that shows it: see `Run`. To be assigned.
    - `talk`: whether to tell of what takes long where no bar shows it.
    """

    def __init__(self, *numbers: signal.Signals, talk: bool):
        self._numbers = numbers
        self._clock = Clock(talk=talk)
        self.stop: Callable[[str], None] = lambda reason: None
        self.begun = False
        self.activity: Callable[[], Activity] = lambda: None
        self.show: Callable[[], Show] = lambda: None
        self._previous: dict[int, Any] = {}
        self._received: list[int] = []
        self._late: list[int] = []
        self._leaving = False
        self._nested = False
        self._stretch = _Stretch(0.0)
        self._heard: list[tuple[int, float]] = []

    def __enter__(self) -> "Signals":
        self._speaker = Speaker(self._hear, self._tick)
        self._speaker.start()
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                previous = signal.getsignal(number)
                # A job under `nohup` ignores Ctrl-C, and goes on doing so; a handler that is not
                # Python's (None) could not be put back.
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
            if (previous := signal.getsignal(_WAKE)) is not None:
                self._previous[_WAKE] = previous
                signal.signal(_WAKE, self._wake)
            self._nested = bool(_active)
            _active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving = True
        self._speaker.stop()
        self._restore()
        if self._received and not self._nested:
            hurry(math.inf)
        for number in self._received:
            # A run within a hook of a run: whoever pressed Ctrl-C meant both.
            if self._nested:
                signal.raise_signal(number)
            elif number == signal.SIGTERM:
                self._terminate(error)
        for number in self._late:
            signal.raise_signal(number)

    @contextlib.contextmanager
    def within(self, limit: float | None) -> Iterator[None]:
        """Raises `Overdue` in the block if that takes more than so many seconds after the run was
        asked to end. `None`: however long it takes."""
        seconds = math.inf if limit is None else limit
        before, self._stretch = self._stretch, _Stretch(seconds, time.monotonic())
        try:
            yield
        finally:
            self._stretch = before

    def begin(self) -> None:
        """From here on there is something to lose."""
        self.end_if_nothing_has_begun()
        self.begun = True
        self._stretch = _Stretch()

    def end_if_nothing_has_begun(self) -> None:
        """Raise what ends the process if it was asked to end, unless a handler of the user's or the
        run around this one decides that."""
        asked_to = [number for number in self._received if not self._is_users(number)]
        if asked_to and not self._nested and not self.begun:
            self._raise(asked_to[0])

    def _restore(self) -> None:
        if self in _active:
            _active.remove(self)
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _terminate(self, error: BaseException | None) -> None:
        if self._previous[signal.SIGTERM] != signal.SIG_DFL:
            signal.raise_signal(signal.SIGTERM)
            return
        if error is not None and not isinstance(error, SystemExit):
            traceback.print_exception(error)  # nobody would see it
        leave(128 + signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from error

    def _raise(self, number: int) -> None:
        # At a prompt nothing but the command is to end.
        interactive = number == signal.SIGINT and hasattr(sys, "ps1")
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        raise KeyboardInterrupt if interactive else NothingBegun(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:  # meant for whoever comes next
            self._late.append(number)
            return
        before = self._stretch.limit == 0 and not self._nested
        if before and self._is_users(number):
            self._previous[number](number, frame)
        elif number not in self._received:
            self._received.append(number)
            if not hurried():
                hurry(time.monotonic())
            self.stop(_REASONS[signal.Signals(number)])
            if before:
                self._raise(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _wake(self, number: int, frame: FrameType | None) -> None:
        # Not where a stretch is about to end: it would stay.
        ours = frame is not None and frame.f_code.co_filename in (__file__, contextlib.__file__)
        if self._is_overdue() and not ours and not _within_jax(frame):
            # Again, if what it is in waits on the way out too, as a pool of threads does.
            self._stretch = self._stretch._replace(began=time.monotonic())
            raise Overdue

    def _is_overdue(self) -> bool:
        stretch = self._stretch
        return bool(self._received) and stretch.limit > 0 and time.monotonic() > stretch.due()

    def _is_users(self, number: int) -> bool:
        return self._previous[number] not in (signal.SIG_DFL, signal.default_int_handler)

    # What follows runs on the speaker's thread.

    def _hear(self, number: int) -> None:
        nested = _active and _active[-1] is not self  # the inner run has told it
        if number not in self._previous or number not in self._numbers or nested:
            return
        again = number in [heard for heard, _ in self._heard]
        self._heard.append((number, time.monotonic()))
        told = again and number == signal.SIGTERM  # which changes nothing
        if not told and (self.begun or not self._is_users(number)):
            say(announcement(number, self.activity(), again=again, begun=self.begun))

    def _tick(self) -> None:
        now = time.monotonic()
        if self._is_overdue() and _WAKE in self._previous:
            # Again and again: it may come just before the main thread waits.
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
        for number, when in self._heard:
            ignored = number not in self._received and now > when + _UNRESPONSIVE
            if ignored and not self.begun and self._previous[number] == signal.SIG_DFL:
                leave_at_once(128 + number)
        self._clock.tick(now, self.activity(), self.show())


def _within_jax(frame: FrameType | None) -> bool:
    """Whether something of JAX's is under way: it computes, and is not waited for in vain; and an
    exception in the middle of its compiler may end the process."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in ("jax", "jaxlib"):
            return True
        frame = frame.f_back
    return False


_active: list[Signals] = []  # of the main thread, the innermost last


def _forget_in_fork() -> None:
    """A fork, such as a worker that reads data, is no part of the run: it has its own signals."""
    if _active:
        signal.set_wakeup_fd(-1)
    while _active:
        _active[-1]._restore()


os.register_at_fork(after_in_child=_forget_in_fork)
