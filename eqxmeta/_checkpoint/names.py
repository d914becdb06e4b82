"""The files in a folder of checkpoints: their names, and which of them is the best."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._direction import improves
from .._errors import CheckpointError, CheckpointNotFound, explain
from .run_meta import read_run

_NAME = re.compile(r"step-([0-9]{9,})\.ckpt")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09}.ckpt"


def step_of(path: Path) -> int | None:
    """The step in the name of a file; `None` if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    step = None if match is None else int(match[1])
    return step if step is not None and path.name == path_of(path.parent, step).name else None


def files_by_step(folder: Path) -> dict[int, Path]:
    """In the order of the steps. By the names alone: a folder of such a name, or a file that cannot
    be read, is found out by whoever reads it."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return dict(sorted((step, path) for path in paths if (step := step_of(path)) is not None))


def refuse_folder(path: Path) -> None:
    """Raises `CheckpointNotFound` if `path` is a folder, naming the newest and the best file. Which
    of them is meant is not ours to guess."""
    if not os.path.isdir(path):  # as opposed to `Path.is_dir`, it never raises
        return
    files = sorted(file for file in path.glob("*.ckpt") if os.path.isfile(file))
    if not files:
        received, expected = "a folder without checkpoints", "a file written by `save`"
    else:
        try:
            best = best_of(path).name
        except CheckpointNotFound:
            best = None
        named = f"the newest {files[-1].name}" + (f", the best {best}" if best else "")
        received = f"a folder with {len(files)} of them, {named}"
        expected = f"one of its files, such as '{path / (best or files[-1].name)}'"
    raise CheckpointNotFound(explain(f"{path} is a folder, not a checkpoint.", received, expected))


def best_of(folder: Path, monitor: str | None = None) -> Path:
    """Of the files of the run that wrote the newest, that with the best value of `monitor`; `None`:
    of what the newest was saved with. Of equals the first.

    A value of a save that is there only because the run ended counts if all steps were taken and
    nothing was saved since. Raises `CheckpointNotFound` if no file has a value that counts.
    """
    metas = _newest_run(folder)
    if not metas:
        message, received = f"There is no checkpoint in {folder}.", "no sound `step-*.ckpt`"
        raise CheckpointNotFound(explain(message, received, "a folder of `Checkpoint`"))
    newest, meta = list(metas.items())[-1]
    ended = meta["step"] == meta["config"].get("steps")
    told = {path: x for path, meta in metas.items() if (x := meta.get("monitored"))}
    names = {x["name"]: x["mode"] for x in told.values()}  # the newest last
    name = (monitor or list(names)[-1]) if names else monitor
    best, value, passed = None, None, ""
    for path, x in told.items():
        if x["name"] != name or x["value"] is None:
            continue
        if x["at_end"] and not (ended and path == newest):
            passed = f"; and {path.name}, measured where the run was broken off"
        elif improves(x["value"], value, names[name]):
            best, value = path, x["value"]
    if best is None:
        message = f"No checkpoint in {folder} has a value of {name or 'a monitor'}."
        known = ", ".join(map(repr, names)) or "none: `Checkpoint` had no `monitor`"
        received = f"{len(metas)} checkpoints, monitored: {known}{passed}"
        expected = "a name that `Checkpoint(monitor=...)` was given, and a save with a value of it"
        raise CheckpointNotFound(explain(message, received, expected))
    return best


def _newest_run(folder: Path) -> dict[Path, dict[str, Any]]:
    """The `meta` of the sound files of the run that wrote the newest, in the order of the steps."""
    metas = {}
    for path in files_by_step(folder).values():
        with suppress(CheckpointError, OSError):
            meta = read_run(path)["meta"]
            if "config" in meta and "step" in meta:  # a run's
                metas[path] = meta
    run = list(metas.values())[-1].get("run") if metas else None
    return {path: meta for path, meta in metas.items() if meta.get("run") == run}
