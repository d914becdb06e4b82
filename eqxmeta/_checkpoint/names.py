"""How the files of a folder of checkpoints are named, and help for whoever passes the folder."""

import re
from pathlib import Path

from .._errors import CheckpointError, CheckpointNotFound, explain
from . import container as _container

NAME = re.compile(r"step-(\d{9,})\.ckpt")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09}.ckpt"


def refuse_folder(path: Path) -> None:
    """Raises `CheckpointNotFound` if `path` is a folder, naming the newest and the best file. Which
    of them is meant is not ours to guess."""
    if not path.is_dir():
        return
    files = sorted(file for file in path.glob("*.ckpt") if file.is_file())
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
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return None  # damaged, or somebody else's `meta`
    return best[0].name if len(best) == 1 and best[0].is_file() else None
