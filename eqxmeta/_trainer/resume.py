"""What `fit(resume=...)` stands for: which checkpoint, or state."""

import errno
import math
import os
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from .._arguments import check_argument
from .._callback.callback import Callback, name_of
from .._callback.log_owner import LOG
from .._callback.run import Origin
from .._checkpoint.save_load import load_state, read_manifest
from .._errors import CheckpointCorrupt, CheckpointNotFound, explain, warn
from .._model.state import TrainState
from .identity import as_asked, refuse_another, tell_of_other_bits


def can_resume(callback: Callback) -> bool:
    """Whether it saves what a run can be resumed from."""
    return type(callback).resume_paths is not Callback.resume_paths


def restore(
    resume: Literal["auto"] | str | Path | TrainState | None,
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
    if isinstance(resume, TrainState):
        return _checked(Origin(_with_arrays(like, resume)), config)
    sound = isinstance(resume, str | os.PathLike)
    expected = "'auto', a path, a `TrainState`, or None"
    check_argument(sound, resume, "fit(resume=...)", expected, TypeError)
    if isinstance(resume, str) and resume != "auto" and not Path(resume).exists():
        message = f"There is no checkpoint at `fit(resume={resume!r})`."
        expected = "'auto', the path of a checkpoint, or None"
        raise CheckpointNotFound(explain(message, "no such file", expected))
    if resume == "auto":
        origin = _newest(like, callbacks, config)
    else:
        path = Path(resume)
        origin = _load(path, read_manifest(path), like, callbacks, config)
    return _checked(origin, config)


def _checked(origin: Origin, config: dict[str, Any]) -> Origin:
    start = int(origin.state.step)
    if start > config["steps"]:
        message = "`fit(steps=...)` is before the checkpoint."
        raise ValueError(explain(message, config["steps"], f"{start} or more"))
    return origin


def _with_arrays(like: TrainState, state: TrainState) -> TrainState:
    """`like`, with the arrays of `state`. Raises `ValueError` if it has not the same ones."""
    old, new = (
        {
            jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if eqx.is_array(x)
        }
        for tree in (like, state)
    )
    for name in {**old, **new}:
        received, expected = (
            f"{name} {x[name].dtype}{list(x[name].shape)}" if name in x else f"no array {name}"
            for x in (new, old)
        )
        if received != expected:
            message = "`fit(resume=...)` is not a state of this strategy and model."
            raise ValueError(explain(message, received, expected))

    def choose(path: Any, x: Any) -> Any:
        return jnp.asarray(new[jax.tree_util.keystr(path)], x.dtype) if eqx.is_array(x) else x

    return jax.tree_util.tree_map_with_path(choose, like)


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
        received, expected = ", ".join(map(str, paths)), "one or more. Move them away to start anew"
        raise CheckpointCorrupt(explain("No checkpoint is sound.", received, expected))
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
    versions = manifest.get("versions", {})
    refuse_another(path, versions, saved, config, ("jax_", "strategy"))
    state = load_state(path, like)  # of another model it lists the arrays, which says most
    refuse_another(path, versions, saved, config, ("model", "tasks"))
    state = as_asked(path, state, like, saved, config)
    tell_of_other_bits(path, versions, saved, config)
    attached = {name_of(callback) for callback in callbacks}
    states = meta.get("callbacks", {})
    forgotten = [n for n, value in states.items() if value.keys() - {LOG} and n not in attached]
    if forgotten:
        warn(f"`{path}` holds the state of callbacks that are not attached: {forgotten}")
    return Origin(state, resuming=True, path=path, meta=meta)
