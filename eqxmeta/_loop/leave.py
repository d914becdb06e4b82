"""The end of a process that SIGTERM has asked for: nothing that hangs may hold it up."""

import contextlib
import os
import sys
import threading
import time

# How long the interpreter may take to end. If it begins to end later than `_SOON` after the call,
# somebody has caught the exit, and this is another.
_SECONDS = 1.0
_SOON = 30.0


def leave(code: int) -> None:
    """Let the interpreter, which is about to end, take at most a second for that: it would wait for
    every thread that is no daemon, for ever if one hangs."""
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
