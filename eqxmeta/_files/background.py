"""One job at a time on a thread of its own, while training goes on."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for


class Background:
    """Runs one job at a time. Its thread ends when the job has been waited for, and the interpreter
    not before the job. A fork has no part in it."""

    def __init__(self, name: str):
        self._name = name
        self._running: tuple[ThreadPoolExecutor, Future[object]] | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running[1].done()

    def start(self, job: Callable[[], object]) -> None:
        """Wait for the job before, and begin this one. If this raises, the job does not go on."""
        self.wait()
        self._pid = os.getpid()
        executor = ThreadPoolExecutor(1, self._name)
        try:
            self._running = executor, executor.submit(job)
        except BaseException:  # no thread to be had, or an interrupt
            executor.shutdown(cancel_futures=True)
            raise

    def wait(self) -> bool:
        """Until the job has ended; whether there was one. Raises its error, once.

        What a signal's handler raises meanwhile, such as `KeyboardInterrupt`, is raised after
        the end; the job's own error then stays for the next call.
        """
        if self._running is None or self._pid != os.getpid():  # a fork has no such thread
            self._running = None
            return False
        executor, future = self._running
        interrupt = None
        # Not `shutdown`, which joins: interrupted, Python 3.11 takes a running thread for ended.
        while not future.done():
            try:
                wait_for([future])
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        executor.shutdown()
        error = future.exception()
        self._running = None  # not before: an interrupt up to here leaves all to the next call
        if error is not None:
            raise error
        return True
