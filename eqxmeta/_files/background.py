"""One thread that writes while training goes on."""

import threading
from collections.abc import Callable


class Background:
    """One job at a time, on a thread of its own, which never outlives the waiting for it."""

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and not self._ended.is_set()

    def start(self, job: Callable[[], object]) -> None:
        """Wait for the job before, and begin this one. If this raises, the job may never run."""
        self.wait()
        self._ended.clear()
        # No daemon: the interpreter does not end in the middle of the job either.
        turn = threading.Lock()  # of the thread, or of whoever calls it off before it begins
        self._thread = threading.Thread(target=self._run, args=(job, turn), name=self._name)
        try:
            self._thread.start()
        except BaseException:  # no thread to be had, or an interrupt
            if turn.acquire(blocking=False):
                self._thread = None
                self._ended.set()
            raise

    def wait(self) -> None:
        """Until the job has ended. Raises its error, once.

        What a signal's handler raises meanwhile, such as `KeyboardInterrupt`, is raised after
        the end; the job's own error then stays for the next call.
        """
        if self._thread is None:
            return
        interrupt = None
        # Not `join`: when interrupted, that of Python 3.11 takes a running thread for ended.
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], object], turn: threading.Lock) -> None:
        if not turn.acquire(blocking=False):
            return
        try:
            job()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()
