"""What `fit(resume=...)` stands for: which checkpoint, or state."""

import math
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_argument, check_path
from .._callback.callback import Callback, name_of
from .._callback.log_owner import LOG_TYPES
from .._callback.run import Origin
from .._checkpoint.names import refuse_folder
from .._checkpoint.run_files import load_run
from .._checkpoint.run_meta import check_types, read_run
from .._errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound, explain, warn
from .._model.state import TrainState
from .._task.processes import Processes
from .._task.task import layout_of
from .identity import as_asked, refuse_another, tell_of_other_bits


def can_resume(callback: Callback) -> bool:
    """Whether it saves what a run can be resumed from."""
    return type(callback).resume_paths is not Callback.resume_paths


# A checkpoint, and its manifest or why that cannot be read.
Found: TypeAlias = tuple[Path, dict[str, Any] | CheckpointError]


def find(
    resume: Literal["auto"] | str | Path | TrainState | None, callbacks: tuple[Callback, ...]
) -> list[Found]:
    """The checkpoints that `fit(resume=...)` may go on from, the newest first.

    Raises `CheckpointError` if there is no such file, or if it is damaged; `TypeError` or
    `ValueError` for another `resume`, and an `OSError` that says nothing of the file.
    """
    if isinstance(resume, TrainState | None):
        return []
    sound = isinstance(resume, str | os.PathLike)
    expected = "'auto', a path, a `TrainState`, or None"
    check_argument(sound, resume, "fit(resume=...)", expected, TypeError)
    if resume != "auto":
        path = check_path(resume, "fit(resume=...)").absolute()
        if isinstance(resume, str) and not os.path.exists(path):
            message = f"There is no checkpoint at `fit(resume={resume!r})`."
            expected = "'auto', the path of a checkpoint, or None"
            raise CheckpointNotFound(explain(message, "no such file", expected))
        refuse_folder(path)
        return [(path, read_run(path))]
    if not any(map(can_resume, callbacks)):
        message = "`fit(resume='auto')` has nothing to resume from."
        expected = "a `Checkpoint` among the callbacks"
        raise ValueError(explain(message, "no callback that saves", expected))
    paths = [path for callback in callbacks for path in callback.resume_paths()]
    found = [(path, _read(path)) for path in paths]
    return sorted(found, key=lambda entry: _step_of(entry[1]), reverse=True)


def restore(
    resume: Literal["auto"] | str | Path | TrainState | None,
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
    if isinstance(resume, TrainState):
        origin = Origin(_with_arrays(like, resume))
    else:
        origin = _first_sound(resume, found, like, callbacks, config)
    start = int(origin.state.step)
    if start > config["steps"]:
        message = "`fit(steps=...)` is before the checkpoint."
        raise ValueError(explain(message, config["steps"], f"{start} or more"))
    return origin


def shared(origin: Origin, processes: Processes) -> Origin:
    """Process 0's, in all of them: they begin at the same numbers, and files are read by one.

    Raises `ValueError` in a process whose state has other arrays."""
    if not processes.several:
        return origin
    arrays, others = eqx.partition(origin.state, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    layout = layout_of(arrays)
    sent = layout, [_numbers(x) for x in leaves], origin.resuming, origin.path, origin.meta
    expected, values, resuming, path, meta = processes.from_first(sent)
    if layout != expected:
        message = "`fit(model=...)` is another model than that of process 0."
        raise ValueError(explain(message, layout, str(expected)))
    restored = [_array(value, x) for value, x in zip(values, leaves, strict=True)]
    state = eqx.combine(jax.tree.unflatten(structure, restored), others)
    return Origin(state, resuming=resuming, path=path, meta=meta)


def _numbers(x: Any) -> np.ndarray:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def _array(value: np.ndarray, like: Any) -> Any:
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    if is_key:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
    return jnp.asarray(value)


def _with_arrays(like: TrainState, state: TrainState) -> TrainState:
    """`like`, with the arrays of `state`. Raises `ValueError` if it has not the same ones."""
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(state)}
    old, new = layout_of(like), layout_of(state)
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            message = "`fit(resume=...)` is not a state of this strategy and model."
            received, expected = (
                f"{name} {x[name]}" if name in x else f"no array {name}" for x in (new, old)
            )
            raise ValueError(explain(message, received, expected))

    def choose(path: Any, x: Any) -> Any:
        return jnp.asarray(leaves[jax.tree_util.keystr(path)], x.dtype) if eqx.is_array(x) else x

    return jax.tree_util.tree_map_with_path(choose, like)


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
    versions = manifest["versions"]
    refuse_another(path, versions, saved, config, ("jax_", "strategy"))
    states = meta.get("callbacks", {})
    for callback in callbacks:
        check_types(path, states.get(name_of(callback), {}), callback.state_types)
    state = load_run(path, manifest, like)  # of another model it lists the arrays, which says most
    refuse_another(path, versions, saved, config, ("model", "tasks"))
    state = as_asked(path, state, like, saved, config)
    tell_of_other_bits(path, versions, saved, config)
    attached = {name_of(callback) for callback in callbacks}
    forgotten = [
        n for n, value in states.items() if value.keys() - LOG_TYPES.keys() and n not in attached
    ]
    if forgotten:
        warn(f"`{path}` holds the state of callbacks that are not attached: {forgotten}")
    return Origin(state, resuming=True, path=path, meta=meta)
