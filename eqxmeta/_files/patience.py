"""How long a disk is waited for: as long as it takes, until the process is asked to end."""

import math
import os
import threading
import time

# What the main thread waits for the disk, once the process is to end, and at least for one sync.
_SECONDS, _LEAST = 0.5, 0.1

_asked = math.inf  # when the process was asked to end, by `time.monotonic()`


def hurry(since: float) -> None:
    """From `since` on every wait is short (`math.inf`: as long as it takes)."""
    global _asked
    _asked = since


def asked() -> float:
    """Since when the process is to end, by `time.monotonic()`; `math.inf` if it is not."""
    return _asked


def hurried() -> bool:
    return _asked < math.inf


def sync_file(descriptor: int) -> None:
    """`os.fsync`, for which the main thread waits at most half a second once the process is to end:
    without it, what was written outlives the process, though not the machine."""
    if threading.current_thread() is not threading.main_thread():
        os.fsync(descriptor)  # the wait for such a thread has a limit of its own
        return
    copy, errors = os.dup(descriptor), []

    def work() -> None:
        try:
            os.fsync(copy)
        except BaseException as error:
            errors.append(error)
        finally:
            os.close(copy)

    thread = threading.Thread(target=work, name="eqxmeta-sync", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread to be had
        os.close(copy)
        os.fsync(descriptor)
        return
    began = time.monotonic()
    while thread.is_alive() and time.monotonic() < max(_asked + _SECONDS, began + _LEAST):
        thread.join(0.05)
    if errors:
        raise errors[0]
