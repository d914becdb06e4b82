"""A run in which something hangs, for `tests/loop/test_hang.py`: `python -m tests.hang_run folder
what [max_time]`. It says "hangs" when it does."""

import hashlib
import os
import signal
import sys
import threading
import time

from eqxmeta.callbacks import JSONL, Callback, Checkpoint

from .boring import BoringTasks, boring_fit, host_batch

FOREVER, REACHED = threading.Event(), threading.Event()
STEP = 30


def hang(seconds=None):
    print("hangs", flush=True)
    FOREVER.wait(seconds)


class Source:
    """`tasks[at]` never comes."""

    def __init__(self, at):
        self.at = at

    def __getitem__(self, step):
        if step == self.at:
            if step:
                REACHED.wait()
            hang()
        return host_batch(step)


class Reached(Callback):
    """Until step `STEP` is taken nothing is said: the source is ahead of it."""

    every = STEP

    def on_step_end(self, run):
        REACHED.set()


class Hook(Callback):
    """Waits for a thread that hangs; which is no daemon, so that the interpreter waits for it."""

    every = STEP

    def __init__(self, hook):
        self.hook = hook

    def on_step_end(self, run):
        self.wait("step end")

    def on_fit_end(self, run):
        self.wait("fit end")

    def wait(self, hook):
        if hook == self.hook:
            thread = threading.Thread(target=hang)
            thread.start()
            thread.join()


class LeftThread(Callback):
    """A thread that hangs and is no daemon, for which nobody waits but the interpreter."""

    every = STEP

    def on_step_end(self, run):
        if run.step == STEP:
            threading.Thread(target=hang).start()


class Tracing(BoringTasks):
    def sample(self, key):
        hang()


class Library(BoringTasks):
    """As a compiler does, it does not let Python's handlers run."""

    def sample(self, key):
        print("hangs", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def slow_disk(seconds):
    """From step `STEP` on, `fsync` takes so long."""
    fsync = os.fsync

    class SlowDisk(Callback):
        every = STEP

        def on_step_end(self, run):
            def slow(descriptor):
                time.sleep(seconds)
                fsync(descriptor)

            if run.step == STEP:
                os.fsync = slow
                threading.Timer(0.3, lambda: print("hangs", flush=True)).start()

    return SlowDisk()


def main(folder, what, max_time=None):
    # A shell that starts a process in the background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tasks, callbacks, _options = None, [], {}
    every = 1 if what == "source" else 10**9
    if what == "source":
        tasks, callbacks = Source(STEP), [Reached()]
    elif what == "first batch":
        tasks = Source(0)
    elif what == "tracing":
        tasks = Tracing()
    elif what == "library":
        tasks = Library()
    elif what == "step end" or what == "fit end":
        callbacks = [Hook(what)]
    elif what == "thread":
        callbacks = [LeftThread()]
    elif what == "disk":
        every = STEP
        callbacks = [slow_disk(60), JSONL(f"{folder}/log.jsonl")]
    callbacks.append(Checkpoint(f"{folder}/saved", every=every))
    steps = STEP if what == "fit end" else 10**9
    max_time = None if max_time is None else float(max_time)
    state = boring_fit(steps, tasks=tasks, callbacks=callbacks, max_time=max_time, summary=True)
    print(f"returned {int(state.step)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
