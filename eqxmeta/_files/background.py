"""One job at a time on a thread of its own, while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for


class Background:
    """Runs one job at a time. Its thread ends with the job, and the interpreter not before it."""

    def __init__(self, name: str):
        self._name = name
        self._running: tuple[ThreadPoolExecutor, Future[object]] | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running[1].done()

    def start(self, job: Callable[[], object]) -> None:
        """Wait for the job before, and begin this one. If this raises, the job does not go on."""
        self.wait()
        executor = ThreadPoolExecutor(1, self._name)
        try:
            self._running = executor, executor.submit(job)
        except BaseException:  # no thread to be had, or an interrupt
            executor.shutdown(cancel_futures=True)
            raise

    def wait(self) -> None:
        """Until the job has ended. Raises its error, once.

        What a signal's handler raises meanwhile, such as `KeyboardInterrupt`, is raised after
        the end; the job's own error then stays for the next call.
        """
        if self._running is None:
            return
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
        self._running = None
        executor.shutdown()
        future.result()
