import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class OnInterrupt:
    """While active, the first Ctrl-C calls `stop` instead of raising `KeyboardInterrupt` at
    whatever line it hits: between a dispatch, which consumes the state, and the assignment of
    its result there is no state to return. The second Ctrl-C raises.

    Python allows handlers in the main thread only; elsewhere this does nothing.
    """

    def __init__(self, stop: Callable[[], None]):
        self._stop = stop
        self._previous: Callable[[int, FrameType | None], object] | int | None = None
        self._active = False

    def __enter__(self) -> "OnInterrupt":
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._previous = signal.getsignal(signal.SIGINT)
            # A job under `nohup` ignores Ctrl-C, and goes on doing so; a handler that
            # is not Python's (None) could not be put back.
            self._active = self._previous not in (signal.SIG_IGN, None)
        if self._active:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop()
