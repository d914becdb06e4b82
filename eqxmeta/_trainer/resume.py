"""What `fit(resume=...)` stands for: which checkpoint, and whether it is of this run."""

import math
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .._arguments import check_argument
from .._callback.callback import Callback, name_of
from .._callback.log_owner import LOG
from .._callback.run import Origin
from .._checkpoint.fingerprint import agree
from .._checkpoint.manifest import library_versions
from .._checkpoint.run_files import check_types, load_run, read_run
from .._errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    explain,
    warn,
)
from .._model.state import TrainState

# A checkpoint of a run in which one of these differs is of another run.
_IDENTITY = (
    "strategy",
    "options",
    "inner_steps",
    "gradient",
    "window",
    "adapts",
    "learns",
    "meta_batch_size",
    "seed",
    "model",
)

# More differences than these are not worth reading.
_TOLD = 5


def can_resume(callback: Callback) -> bool:
    """Whether it saves what a run can be resumed from."""
    return type(callback).resume_paths is not Callback.resume_paths


# A checkpoint, and its manifest or why that cannot be read.
Found: TypeAlias = tuple[Path, dict[str, Any] | CheckpointError]


def find(
    resume: Literal["auto"] | str | Path | None, callbacks: tuple[Callback, ...]
) -> list[Found]:
    """The checkpoints that `fit(resume=...)` may go on from, the newest first.

    Raises `CheckpointError` if there is no such file, or if it is damaged; `TypeError` or
    `ValueError` for another `resume`, and an `OSError` that says nothing of the file.
    """
    if resume is None:
        return []
    sound = isinstance(resume, str | os.PathLike)
    check_argument(sound, resume, "fit(resume=...)", "'auto', a path, or None", TypeError)
    if resume != "auto":
        if isinstance(resume, str) and not os.path.exists(resume):
            message = f"There is no checkpoint at `fit(resume={resume!r})`."
            expected = "'auto', the path of a checkpoint, or None"
            raise CheckpointNotFound(explain(message, "no such file", expected))
        return [(Path(resume), read_run(Path(resume)))]
    if not any(map(can_resume, callbacks)):
        message = "`fit(resume='auto')` has nothing to resume from."
        expected = "a `Checkpoint` among the callbacks"
        raise ValueError(explain(message, "no callback that saves", expected))
    paths = [path for callback in callbacks for path in callback.resume_paths()]
    found = [(path, _read(path)) for path in paths]
    return sorted(found, key=lambda entry: _step_of(entry[1]), reverse=True)


def restore(
    resume: Literal["auto"] | str | Path | None,
    found: list[Found],
    like: TrainState,
    callbacks: tuple[Callback, ...],
    config: dict[str, Any],
) -> Origin:
    """Where the run begins that `fit(resume=...)` asks for, and for which `find` has `found` these.

    `like` is a state of the run that asks, of which shapes are enough if anything was found;
    `config` what `describe` says of it.

    Raises `CheckpointError` if nothing of what was found is sound, or it is of another run;
    `ValueError` for `steps` before the file's.
    """
    origin = _first_sound(resume, found, like, callbacks, config)
    start = int(origin.state.step)
    if start > config["steps"]:
        message = "`fit(steps=...)` is before the checkpoint."
        raise ValueError(explain(message, config["steps"], f"{start} or more"))
    return origin


def _first_sound(
    resume: Literal["auto"] | str | Path | None,
    found: list[Found],
    like: TrainState,
    callbacks: tuple[Callback, ...],
    config: dict[str, Any],
) -> Origin:
    if not found:
        return Origin(like, resuming=resume is not None)
    for path, manifest in found:
        try:
            if isinstance(manifest, CheckpointError):
                raise manifest
            return _load(path, manifest, like, callbacks, config)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            if resume != "auto":
                raise
            warn(f"Skipping a damaged checkpoint, {path}. {error}")
    received = ", ".join(str(path) for path, _ in found)
    expected = "one or more. Move them away to start anew"
    raise CheckpointCorrupt(explain("No checkpoint is sound.", received, expected))


def _read(path: Path) -> dict[str, Any] | CheckpointError:
    """The manifest of a run's own file, or why it cannot be read."""
    try:
        manifest = read_run(path)
    except (CheckpointCorrupt, CheckpointNotFound) as error:
        return error
    saved = manifest["meta"].get("file", path.name)
    if saved == path.name:
        return manifest
    # A file under the name of another is found by whoever looks for the other.
    message = f"Checkpoint {path} is damaged: it is another one."
    expected = "the file that was saved under this name. Rename it, or pass its path as `resume`"
    return CheckpointCorrupt(explain(message, f"the file that was saved as {saved}", expected))


def _step_of(manifest: dict[str, Any] | CheckpointError) -> int | float:
    """Before all others what is damaged or no run's, so that it is told of."""
    return math.inf if isinstance(manifest, Exception) else manifest["meta"].get("step", math.inf)


def _load(
    path: Path,
    manifest: dict[str, Any],
    like: TrainState,
    callbacks: tuple[Callback, ...],
    config: dict[str, Any],
) -> Origin:
    meta = manifest["meta"]
    saved = meta.get("config", {})
    _refuse(path, _other_settings(saved, config))
    states = meta.get("callbacks", {})
    for callback in callbacks:
        check_types(path, states.get(name_of(callback), {}), callback.state_types)
    state = load_run(path, manifest, like)  # of another model it lists the arrays, which says most
    same_libraries = manifest.get("versions") == library_versions()
    _refuse(path, _other_parts(saved, config, same_libraries=same_libraries))
    attached = {name_of(callback) for callback in callbacks}
    forgotten = [n for n, value in states.items() if value.keys() - {LOG} and n not in attached]
    if forgotten:
        warn(f"`{path}` holds the state of callbacks that are not attached: {forgotten}")
    return Origin(state, resuming=True, path=path, meta=meta)


def _refuse(path: Path, differ: dict[str, tuple[str, str]]) -> None:
    """`differ`: what makes them two runs, by name, as it is in the file and in this run."""
    if not differ:
        return
    there = ", ".join(f"{name}={old}" for name, (old, _) in differ.items())
    here = ", ".join(f"{name}={new}" for name, (_, new) in differ.items())
    expected = (
        f"{here}, as this run has. Continue with what was saved, or save this run to another "
        f"folder. Its weights alone start a new run: `model = eqxmeta.load_model('{path}', model)`"
    )
    received = f"a checkpoint with {there}"
    raise CheckpointMismatch(explain(f"`{path}` is of another run.", received, expected))


def _other_settings(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    old = {name: saved.get(name) for name in _IDENTITY}
    return {n: (repr(old[n]), repr(config[n])) for n in _IDENTITY if old[n] != config[n]}


def _other_parts(
    saved: dict[str, Any], config: dict[str, Any], *, same_libraries: bool
) -> dict[str, tuple[str, str]]:
    """Of the model and the tasks, by key path. `same_libraries`: else their layers may have other
    fields by now, and only those are compared that both have."""
    differ = {}
    for what, old in saved.get("fingerprint", {}).items():
        new = config["fingerprint"].get(what, {})
        for path in {**old, **new}:
            both = path in old and path in new
            if not agree(old[path], new[path]) if both else same_libraries:
                differ[f"{what}{path}"] = (old.get(path, "nothing"), new.get(path, "nothing"))
    return dict(list(differ.items())[:_TOLD])
