"""The files of a run in a folder of checkpoints: one per step that was saved."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, explain, warn
from .._files.atomic import remove_leftovers
from .._files.paths import set_aside
from .._model.state import TrainState
from .names import files_by_step, path_of
from .run_meta import corrupt, read_run
from .save_load import load_state, verify, write_tree


@dataclass(frozen=True)
class CheckpointFiles:
    """`folder/step-000001000.ckpt` and its like. Whose they are is for the caller to know."""

    folder: Path

    def path(self, step: int) -> Path:
        return path_of(self.folder, step)

    def by_step(self) -> dict[int, Path]:
        return files_by_step(self.folder)

    def prepare(self) -> None:
        """Make the folder, without what a write that was killed has left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, "step-*.ckpt")

    def refuse_any(self) -> None:
        """Raises `FileExistsError`: a new run shall not mix its files with those of another."""
        files = self.by_step()
        if files:
            message = f"The folder {self.folder} holds the checkpoints of an earlier run."
            received = f"{len(files)} of them, the newest {files[max(files)].name}"
            expected = '`fit(..., resume="auto")` to continue that run, another folder, or '
            expected += "`Checkpoint(overwrite=True)`, which renames them"
            raise FileExistsError(explain(message, received, expected))

    def set_aside_all(self) -> None:
        """A new run takes the place of the one whose files are there."""
        files = self.by_step().values()
        for path in files:
            set_aside(path)
        if files:
            warn(f"The run begins anew: {len(files)} checkpoints in {self.folder} are now *.stale.")

    def remove(
        self, steps: Iterable[int], run_id: str | None, check: Callable[[], None]
    ) -> Iterator[int]:
        """Remove the files of `steps`, unless another run than that of `run_id` has written them
        anew; yields the steps of which that is done. `check` raises if the folder is no longer the
        run's."""
        for step in steps:
            check()
            path = self.path(step)
            try:
                if path.exists() and id_of(path) != run_id:
                    warn(f"{path} is not removed: it is no longer the file that this run wrote.")
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:  # tried again at the next save
                warn(f"An old checkpoint could not be removed: {error}")
            else:
                yield step

    def set_aside(self, *, after: int) -> None:
        """The run is to write files of these steps again, and these may be all that is left."""
        for step, path in self.by_step().items():
            if step > after:
                stale = set_aside(path)
                warn(f"The run continues from step {after}: {path} is now {stale.name}.")


def load_run(path: Path, manifest: dict[str, Any], like: TrainState) -> TrainState:
    """The state of a run, as `load`; `like` is the state that the run begins with. `manifest` is
    that of `read_run`."""
    state = load_state(path, like)
    step = int(state.step)
    if step < 0 or step != manifest["meta"].get("step", step):
        raise corrupt(path, f"a state after step {step}, saved as that of another step")
    return state


def id_of(path: Path) -> str | None:
    """The id of the run that wrote `path`, if that can be read."""
    try:
        return read_run(path)["meta"].get("run")
    except (CheckpointError, OSError):
        return None


def write(
    path: Path,
    state: Any,
    meta: dict[str, Any],
    *,
    check: Callable[[], None],
    before: Callable[[], None] = lambda: None,
    again: bool = False,
) -> None:
    """Write a checkpoint and read it back. `before` is called when it has all but its name, then
    `check`, which raises if the folder is no longer the run's. Raises `FileExistsError` instead of
    overwriting one, unless the run that `meta` names has written that itself and does so `again`.
    """
    ours = False

    def ready() -> None:
        nonlocal ours
        before()
        check()
        if path.exists() and not (again and id_of(path) == meta["run"]):
            expected = "a folder into which nobody else writes meanwhile"
            raise FileExistsError(explain(f"{path} is not overwritten.", "a file", expected))
        ours = True

    try:
        write_tree(path, state, meta, ready)
        verify(path)
    except BaseException:
        # Not to be taken for a checkpoint; nor removed, for it tells of the disk.
        if ours and not again:
            with suppress(OSError, CheckpointError):
                check()
                set_aside(path)
        raise
