"""What `fit(resume=...)` stands for: which checkpoint, and whether it is of this run."""

import errno
import math
import os
from pathlib import Path
from typing import Any, Literal

from .._arguments import check_argument, check_path
from .._callback.callback import Callback, name_of
from .._callback.log_owner import LOG
from .._callback.run import Origin
from .._checkpoint.fingerprint import agree
from .._checkpoint.save_load import library_versions, load_state, read_manifest
from .._errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound, explain, warn
from .._model.state import TrainState

# A checkpoint of a run in which one of these differs is of another run.
_IDENTITY = (
    "strategy",
    "options",
    "inner_steps",
    "gradient",
    "adapts",
    "meta_batch_size",
    "seed",
    "model",
)

# More differences than these are not worth reading.
_TOLD = 5


def can_resume(callback: Callback) -> bool:
    """Whether it saves what a run can be resumed from."""
    return type(callback).resume_paths is not Callback.resume_paths


def restore(
    resume: Literal["auto"] | str | Path | None,
    like: TrainState,
    callbacks: tuple[Callback, ...],
    config: dict[str, Any],
) -> Origin:
    """Where the run begins that `fit(resume=...)` asks for.

    `like` is a state of the run that asks, `config` what `describe` says of it.

    Raises `CheckpointError` if there is no such file, none that is sound, or if it is of
    another run; `TypeError` or `ValueError` for another `resume`, or `steps` before the file's.
    """
    if resume is None:
        return Origin(like)
    sound = isinstance(resume, str | os.PathLike)
    check_argument(sound, resume, "fit(resume=...)", "'auto', a path, or None", TypeError)
    if resume == "auto":
        origin = _newest(like, callbacks, config)
    else:
        path = check_path(resume, "fit(resume=...)").absolute()
        if isinstance(resume, str) and not path.exists():
            message = f"There is no checkpoint at `fit(resume={resume!r})`."
            expected = "'auto', the path of a checkpoint, or None"
            raise CheckpointNotFound(explain(message, "no such file", expected))
        origin = _load(path, read_manifest(path), like, callbacks, config)
    start = int(origin.state.step)
    if start > config["steps"]:
        message = "`fit(steps=...)` is before the checkpoint."
        raise ValueError(explain(message, config["steps"], f"{start} or more"))
    return origin


def _newest(like: TrainState, callbacks: tuple[Callback, ...], config: dict[str, Any]) -> Origin:
    """The newest sound file of all callbacks, or a start if there is no file."""
    if not any(map(can_resume, callbacks)):
        message = "`fit(resume='auto')` has nothing to resume from."
        expected = "a `Checkpoint` among the callbacks"
        raise ValueError(explain(message, "no callback that saves", expected))
    paths = [path for callback in callbacks for path in callback.resume_paths()]
    found = [(path, _read(path)) for path in paths]
    for path, manifest in sorted(found, key=lambda entry: _step_of(entry[1]), reverse=True):
        try:
            if isinstance(manifest, Exception):
                raise manifest
            return _load(path, manifest, like, callbacks, config)
        except (CheckpointCorrupt, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            warn(f"Skipping a damaged checkpoint, {path}. {error}")
    if paths:
        expected = "at least one. Move them away to start anew"
        raise CheckpointCorrupt(
            explain("No checkpoint is sound.", ", ".join(map(str, paths)), expected)
        )
    return Origin(like, resuming=True)


def _read(path: Path) -> dict[str, Any] | CheckpointCorrupt | OSError:
    """The manifest of a run's own file, or why it cannot be read."""
    try:
        manifest = read_manifest(path)
    except (CheckpointCorrupt, OSError) as error:
        return error
    saved = manifest["meta"].get("file", path.name)
    if saved == path.name:
        return manifest
    # A file under the name of another is found by whoever looks for the other.
    message = f"Checkpoint {path} is damaged: it is another one."
    expected = "the file that was saved under this name. Rename it, or pass its path as `resume`"
    return CheckpointCorrupt(explain(message, f"the file that was saved as {saved}", expected))


def _step_of(manifest: dict[str, Any] | Exception) -> int | float:
    """Before all others what is damaged or no run's, so that it is told of."""
    step = None if isinstance(manifest, Exception) else manifest["meta"].get("step")
    return step if isinstance(step, int) else math.inf


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
    state = load_state(path, like)  # of another model it lists the arrays, which says most
    same_libraries = manifest.get("versions") == library_versions()
    _refuse(path, _other_parts(saved, config, same_libraries=same_libraries))
    attached = {name_of(callback) for callback in callbacks}
    states = meta.get("callbacks", {})
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
        new = config["fingerprint"][what]
        for path in {**old, **new}:
            both = path in old and path in new
            if not agree(old[path], new[path]) if both else same_libraries:
                differ[f"{what}{path}"] = (old.get(path, "nothing"), new.get(path, "nothing"))
    return dict(list(differ.items())[:_TOLD])
