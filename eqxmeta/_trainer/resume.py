"""What `fit(resume=...)` stands for: which checkpoint, and whether it is of this run."""

import difflib
import errno
import math
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .._callback.callback import Callback, name_of
from .._callback.log_owner import LOG
from .._checkpoint.fingerprint import agree
from .._checkpoint.save_load import library_versions, load_state, read_manifest
from .._errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound, explain, warn
from .._model.state import TrainState
from .summary import without_addresses

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
    "tasks",
)
# Not in the checkpoints of earlier versions.
_LATER = ("options", "adapts")

# More differences than these are not worth reading.
_TOLD = 5


class Restored(NamedTuple):
    """A checkpoint, the state in it, and by callback what each saved of itself."""

    path: Path
    state: TrainState
    callback_states: dict[str, Any]


def can_resume(callback: Callback) -> bool:
    """Whether it saves what a run can be resumed from."""
    return type(callback).resume_paths is not Callback.resume_paths


def restore(
    resume: Literal["auto"] | str | Path | None,
    like: TrainState,
    callbacks: tuple[Callback, ...],
    config: dict[str, Any],
) -> Restored | None:
    """What `fit(resume=...)` stands for; `None` is a start.

    `like` is a state of the run that asks, `config` what `describe` says of it.

    Raises `CheckpointError` if there is no such file, none that is sound, or if it is of
    another run; `TypeError` or `ValueError` for another `resume`.
    """
    if resume is None:
        return None
    if not isinstance(resume, str | os.PathLike):
        raise TypeError(
            explain("`fit(resume=...)` is invalid.", repr(resume), "'auto', a path, or None")
        )
    if isinstance(resume, str) and resume != "auto" and not Path(resume).exists():
        near = difflib.get_close_matches(resume.lower(), ["auto"])
        hint = f" Did you mean '{near[0]}'?" if near else ""
        expected = f"'auto', the path of a checkpoint, or None.{hint}"
        message = f"There is no checkpoint at `fit(resume={resume!r})`."
        raise CheckpointNotFound(explain(message, "no such file", expected))
    if resume != "auto":
        return _load(Path(resume), like, callbacks, config)
    if not any(map(can_resume, callbacks)):
        raise ValueError(
            explain(
                "`fit(resume='auto')` has nothing to resume from.",
                "no callback that saves",
                "a `Checkpoint` among the callbacks",
            )
        )
    paths = [path for callback in callbacks for path in callback.resume_paths()]
    # The newest of all callbacks' files; damaged ones first, so that they are told of.
    for path in sorted(paths, key=_step_of, reverse=True):
        try:
            _check_name(path)
            return _load(path, like, callbacks, config)
        except (CheckpointCorrupt, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            message = f"Skipping a damaged checkpoint, {path}. {error}"
            warn(message)
    if paths:
        raise CheckpointCorrupt(
            explain(
                "No checkpoint is sound.",
                ", ".join(map(str, paths)),
                "at least one. Move them away to start anew",
            )
        )
    return None


def _load(
    path: Path, like: TrainState, callbacks: tuple[Callback, ...], config: dict[str, Any]
) -> Restored:
    manifest = read_manifest(path)
    meta = manifest["meta"]
    saved = meta.get("config", {})
    _refuse(path, _other_settings(saved, config))
    state = load_state(path, like)  # of another model it lists the arrays, which says most
    same_libraries = manifest.get("versions") == library_versions()
    _refuse(path, _other_parts(saved, config, same_libraries=same_libraries))
    states = dict(meta.get("callbacks", {}))
    attached = {name_of(callback) for callback in callbacks}
    forgotten = [n for n, value in states.items() if value.keys() - {LOG} and n not in attached]
    if forgotten:
        message = f"`{path}` holds the state of callbacks that are not attached: {forgotten}"
        warn(message)
    return Restored(path, state, states)


def _refuse(path: Path, differ: dict[str, tuple[str, str]]) -> None:
    """`differ`: what makes them two runs, by name, as it is in the file and in this run."""
    if not differ:
        return
    there = ", ".join(f"{name}={old}" for name, (old, _) in differ.items())
    here = ", ".join(f"{name}={new}" for name, (_, new) in differ.items())
    raise CheckpointMismatch(
        explain(
            f"`{path}` is of another run.",
            f"a checkpoint with {there}",
            f"{here}, as this run has. Continue "
            "with what was saved, or save this run to another folder. Its weights alone start "
            f"a new run: `model = eqxmeta.load_model('{path}', model)`",
        )
    )


def _other_settings(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    old = {n: saved.get(n, config[n] if n in _LATER else None) for n in _IDENTITY}
    if "fingerprint" in saved:  # which says more of the tasks than what they print
        old["tasks"] = config["tasks"]
    elif isinstance(old["tasks"], str):
        old["tasks"] = without_addresses(old["tasks"])
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


def _step_of(path: Path) -> int | float:
    """Before all others what is damaged or no run's, so that it is told of."""
    try:
        step = read_manifest(path)["meta"].get("step")
    except (CheckpointCorrupt, OSError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _check_name(path: Path) -> None:
    """A file under the name of another is found by whoever looks for the other."""
    saved = read_manifest(path)["meta"].get("file", path.name)
    if saved != path.name:
        raise CheckpointCorrupt(
            explain(
                f"Checkpoint {path} is damaged: it is another one.",
                f"the file that was saved as {saved}",
                "the file that was saved under this name. Rename it, or pass its path as `resume`",
            )
        )
