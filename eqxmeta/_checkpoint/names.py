"""How the files of a folder of checkpoints are named, and help for whoever passes the folder."""

import os
import re
from pathlib import Path

from .._errors import CheckpointError, CheckpointNotFound, explain
from . import container as _container

_NAME = re.compile(r"step-([0-9]{9,})\.ckpt")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09}.ckpt"


def step_of(path: Path) -> int | None:
    """The step in the name of a file; `None` if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    step = None if match is None else int(match[1])
    return step if step is not None and path.name == path_of(path.parent, step).name else None


def refuse_folder(path: Path) -> None:
    """Raises `CheckpointNotFound` if `path` is a folder, naming the newest and the best file. Which
    of them is meant is not ours to guess."""
    if not os.path.isdir(path):  # as opposed to `Path.is_dir`, it never raises
        return
    files = sorted(file for file in path.glob("*.ckpt") if os.path.isfile(file))
    if not files:
        received, expected = "a folder without checkpoints", "a file written by `save`"
    else:
        best = _best(files[-1])
        named = f"the newest {files[-1].name}" + (f", the best {best}" if best else "")
        received = f"a folder with {len(files)} of them, {named}"
        expected = f"one of its files, such as '{path / (best or files[-1].name)}'"
    raise CheckpointNotFound(explain(f"{path} is a folder, not a checkpoint.", received, expected))


def _best(newest: Path) -> str | None:
    """What the newest file knows of the best: the state of the `Checkpoint` that wrote it."""
    try:
        with _container.reading(newest) as reader:
            states = reader.manifest["meta"].get("callbacks", {}).values()
        steps = [state["best_step"] for state in states if state.get("best_step") is not None]
        best = [path_of(newest.parent, step) for step in steps]
        return best[0].name if len(best) == 1 and os.path.isfile(best[0]) else None
    except (CheckpointError, OSError, AttributeError, TypeError, ValueError):
        return None  # damaged, or somebody else's `meta`
