"""The files of a run in a folder of checkpoints: one per step that was saved."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from .._errors import CheckpointCorrupt, CheckpointError, explain, warn
from .._files.atomic import remove_leftovers
from .._files.paths import set_aside
from .._model.state import TrainState
from .names import path_of, step_of
from .save_load import load_state, read_manifest, verify, write_tree


@dataclass(frozen=True)
class CheckpointFiles:
    """`folder/step-000001000.ckpt` and its like. Whose they are is for the caller to know."""

    folder: Path

    def path(self, step: int) -> Path:
        return path_of(self.folder, step)

    def by_step(self) -> dict[int, Path]:
        # By the names alone: what they are, a folder or unreadable, who reads them finds out.
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return {step: path for path in paths if (step := step_of(path)) is not None}

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
            expected = '`fit(..., resume="auto")` to continue that run, or another folder'
            raise FileExistsError(explain(message, received, expected))

    def set_aside(self, *, after: int) -> None:
        """The run is to write files of these steps again, and these may be all that is left."""
        for step, path in sorted(self.by_step().items()):
            if step > after:
                stale = set_aside(path)
                warn(f"The run continues from step {after}: {path} is now {stale.name}.")


# What a run says of itself in the `meta` of its checkpoints, where it says anything of the name.
_META = {
    "step": int,
    "file": str,
    "run": str,
    "config": dict[str, Any],
    "skipped": int,
    "skipped_in_a_row": int,
    "callbacks": dict[str, dict[str, Any]],
    "monitored": dict[str, Any] | None,
}
_MONITORED = {"name": str, "mode": str, "value": int | float | None, "at_end": bool}
_FINGERPRINT = {"fingerprint": dict[str, dict[str, str]]}


def read_run(path: Path) -> dict[str, Any]:
    """The manifest of a run's checkpoint, as `read_manifest`. What it says of the run has the types
    that it must have, so that nobody who is told it need ask: else `CheckpointCorrupt`."""
    manifest = read_manifest(path)
    meta = manifest["meta"]
    check_types(path, meta, _META)
    check_types(path, meta.get("config", {}), _FINGERPRINT)
    check_types(path, meta.get("monitored") or {}, _MONITORED)
    if any(meta.get(name, 0) < 0 for name in ("step", "skipped", "skipped_in_a_row")):
        raise _corrupt(path, "a number of steps below 0")
    return manifest


def check_types(path: Path, found: dict[str, Any], types: Mapping[str, Any]) -> None:
    """Raises `CheckpointCorrupt` if something in `path` has another type than that of its name."""
    for name, kind in types.items():
        if name in found and not _is(found[name], kind):
            raise _corrupt(path, f"{name}={json.dumps(found[name])[:100]}")


def load_run(path: Path, manifest: dict[str, Any], like: TrainState) -> TrainState:
    """The state of a run, as `load`; `like` is the state that the run begins with. `manifest` is
    that of `read_run`."""
    state = load_state(path, like)
    step = int(state.step)
    if step < 0 or step != manifest["meta"].get("step", step):
        raise _corrupt(path, f"a state after step {step}, saved as that of another step")
    return state


def _is(value: Any, kind: Any) -> bool:
    """Of JSON: `True` is no number."""
    if isinstance(kind, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if get_origin(kind) is not dict:
        return kind is Any or (isinstance(value, kind) and (type(value) is bool) == (kind is bool))
    return type(value) is dict and all(_is(x, get_args(kind)[1]) for x in value.values())


def _corrupt(path: Path, received: str) -> CheckpointCorrupt:
    message = f"Checkpoint {path} is damaged, or not of a run."
    return CheckpointCorrupt(explain(message, received, "what a run says of itself"))


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
