"""A thread that says what the main thread, which may be inside XLA for a minute, cannot."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from .._errors import Unfailing

_MILLISECONDS = 200


class Speaker:
    """Between `start` and `stop` calls `heard(number)` as soon as a signal with a Python handler
    comes, and `tick()` a few times a second, both on its own thread.

    Python runs handlers in the main thread, between two of its instructions. But the number of a
    signal is written to the `wakeup_fd` at once. Whoever had that before still gets it, and has it
    back afterwards.
    """

    def __init__(self, heard: Callable[[int], None], tick: Callable[[], None]):
        self._heard = heard
        self._tick = tick
        self._thread = threading.Thread(target=self._work, name="eqxmeta-speaker", daemon=True)
        self._before: int | None = None  # the `wakeup_fd`; `None`: not ours to change

    def start(self) -> None:
        self._ended = threading.Event()
        self._read, self._write = os.pipe()
        for end in self._read, self._write:
            os.set_blocking(end, False)
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def stop(self) -> None:
        if self._before is not None:
            # It was opened by somebody else, who may have closed it.
            try:
                signal.set_wakeup_fd(self._before)
            except (ValueError, OSError):
                signal.set_wakeup_fd(-1)
        self._ended.set()
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")
        self._thread.join(1.0)  # it may be held up by a terminal that takes no more
        if not self._thread.is_alive():
            os.close(self._read)
            os.close(self._write)

    def _work(self) -> None:
        poll = select.poll()  # not `select`, which knows a thousand files only
        poll.register(self._read, select.POLLIN)
        while not self._ended.is_set():
            poll.poll(_MILLISECONDS)
            numbers = self._pass_on()
            with contextlib.suppress(Exception):  # telling must not cost the run
                for number in numbers:
                    self._heard(number)
                if not self._ended.is_set():
                    self._tick()
        self._pass_on()  # what came up to the end

    def _pass_on(self) -> bytes:
        """The signals that have come, of which whoever had the `wakeup_fd` before hears as well."""
        try:
            numbers = os.read(self._read, 512).replace(b"\0", b"")
        except BlockingIOError:
            return b""
        if numbers and self._before not in (None, -1):
            with contextlib.suppress(OSError):
                os.write(self._before, numbers)  # pyright: ignore[reportArgumentType]
        return numbers


def say(line: str) -> None:
    """A line on stderr, above whatever bars are there. Never raises, but for an interrupt."""
    file: Any = Unfailing(sys.stderr)
    with contextlib.suppress(Exception):
        bars = sys.modules.get("tqdm")  # without it there are none
        if bars is None:
            print(line, file=file, flush=True)
        else:
            bars.tqdm.write(f"{line}\n", file=file, end="")
            file.flush()
