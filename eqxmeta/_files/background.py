"""One job at a time on a thread of its own, while training goes on."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

from .patience import asked

# What a disk is given once the process is to end.
SECONDS = 1.0
_BYTES_A_SECOND = 50e6


class Background:
    """Runs one job at a time. Its thread is a daemon, which holds up nobody: neither whoever waits
    with a limit, nor the interpreter's end. A fork has no part in it."""

    def __init__(self, name: str):
        self._name = name
        self._running: tuple[Future[object], threading.Thread] | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running[0].done()

    def start(self, job: Callable[[], object], size: int = 0) -> None:
        """Wait for the job before, and begin this one, which writes `size` bytes. If this raises,
        the job does not go on."""
        self.wait()
        future = Future[object]()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        self._pid, self._begun, self._size = os.getpid(), time.monotonic(), size
        thread = threading.Thread(target=work, name=self._name, daemon=True)
        self._running = future, thread
        try:
            thread.start()
        except BaseException:  # no thread to be had, or an interrupt
            if future.cancel():
                self._running = None
            raise

    def wait(self) -> bool:
        """Until the job has ended, or, once the process is to end, has had a second, and one more
        for each 50 MB; whether there was a job that has ended. Raises its error, once.

        What a signal's handler raises meanwhile, such as `KeyboardInterrupt`, is raised at once.
        The job then goes on, and its error stays for the next call.
        """
        if self._running is None or self._pid != os.getpid():  # a fork has no such thread
            self._running = None
            return False
        future, thread = self._running
        while not future.done():
            limit = max(asked(), self._begun) + SECONDS + self._size / _BYTES_A_SECOND
            if time.monotonic() > limit:
                return False
            wait_for([future], 0.05)
        thread.join()  # nothing is left for it to do
        error = future.exception()
        self._running = None  # not before: an interrupt up to here leaves all to the next call
        if error is not None:
            raise error
        return True

    def when_done(self, action: Callable[[], None]) -> None:
        """Call `action` when the job that is running has ended, at once if there is none."""
        if self._running is None:
            action()
        else:
            self._running[0].add_done_callback(lambda future: action())
