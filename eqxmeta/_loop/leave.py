"""The end of a process that SIGTERM has asked for: nothing that hangs may hold it up."""

import contextlib
import os
import sys
import threading
import time

# The interpreter's end, from its begin on; what begins later than this was not our exit.
_SECONDS = 1.0
_SOON = 30.0


def leave(code: int) -> None:
    """See to it that the interpreter's end, which is about to come, takes no longer than a second:
    it would wait for every thread that is no daemon, for ever if that hangs."""
    asked, ending = time.monotonic(), threading.Event()

    def watch() -> None:
        ending.wait()
        if time.monotonic() < asked + _SOON:
            time.sleep(_SECONDS)
            leave_at_once(code)

    threading.Thread(target=watch, name="eqxmeta-leave", daemon=True).start()
    # Called before the threads are joined, which `atexit` is not.
    threading._register_atexit(ending.set)  # pyright: ignore[reportAttributeAccessIssue]


def leave_at_once(code: int) -> None:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
