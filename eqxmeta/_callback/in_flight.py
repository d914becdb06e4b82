"""The checkpoint that is being written while training goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .._errors import CheckpointInUse, warn
from .._files.background import Background


class InFlight:
    """Writes the checkpoints of a run on a thread, one at a time.

    - `step`: of the file that is being written, until it is settled; `None` if there is none.
    - `background`: that thread.
    - `on_error`: see `Checkpoint`.
    """

    def __init__(self, on_error: Literal["raise", "warn"]):
        self._on_error = on_error
        self.background = Background("eqxmeta-checkpoint")
        self.forget()

    def forget(self) -> None:
        self.step: int | None = None
        self._path = Path()
        self._done: Callable[[], None] = lambda: None

    def start(
        self,
        step: int,
        path: Path,
        write: Callable[[], object],
        done: Callable[[], None],
        size: int = 0,
    ) -> None:
        """`write`, which writes `path` of `size` bytes, on the thread. `done` is called by `settle`
        once it is there."""
        self.background.start(write, size)
        self.step, self._path, self._done = step, path, done

    def settle(self) -> None:
        """Wait for the write: its file counts from here on, or its error is told."""
        if self.step is None:
            return
        try:
            written = self.background.wait()
            if self.background.busy:
                return
        except Exception as error:  # of the thread: what it means for the run the user has said
            step, self.step = self.step, None
            if self._on_error == "raise" or isinstance(error, CheckpointInUse):
                error.add_note(f"The checkpoint of step {step} was not written: {self._path}")
                raise
            warn(f"{self._path} was not written, training goes on: {error!r}")
        else:
            self.step = None
            if written:  # else this is a fork of the process that writes
                self._done()
