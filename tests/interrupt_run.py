"""A run that `test_ctrl_c` interrupts: `python -m tests.interrupt_run folder [again]`.

With `again`, the end of the run takes its time, and asks to be interrupted once more.
"""

import signal
import sys
import time

from eqxmeta.callbacks import Callback, Checkpoint

from .boring import boring_fit


class Shout(Callback):
    def __init__(self, slow_end):
        self.slow_end = slow_end

    def on_chunk_end(self, run, metrics):
        print("running", flush=True)

    def on_fit_end(self, run):
        if self.slow_end:
            print("ending", flush=True)
            time.sleep(60)


def main(folder, *again):
    # A shell that starts a process in the background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = [Shout(bool(again)), Checkpoint(folder, every=10**9)]
    state = boring_fit(10**9, callbacks=callbacks, summary=True)
    restored = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(f"returned {int(state.step)} {restored}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
