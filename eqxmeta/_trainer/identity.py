"""Whether a checkpoint is of the run that asks to be resumed, and in what they may differ."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._checkpoint.array_facts import agree
from .._checkpoint.fingerprint import is_held
from .._checkpoint.manifest import library_versions
from .._errors import CheckpointMismatch, explain, warn
from .._model.state import TrainState

# A checkpoint of a run in which one of these differs is of another run.
_IDENTITY = ("strategy", "adapts", "learns", "meta_batch_size", "seed", "model")

# More differences than these are not worth reading.
_TOLD = 5


def refuse_another(
    path: Path,
    versions: dict[str, str],
    saved: dict[str, Any],
    config: dict[str, Any],
    which: tuple[str, ...],
) -> None:
    """Raises `CheckpointMismatch` if the run that `saved` describes differs from that of `config`
    in its settings, or in those parts of its fingerprint."""
    same = versions == library_versions()
    differ = _other_settings(saved, config) or _other_parts(saved, config, which, same)
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
    saved: dict[str, Any],
    config: dict[str, Any],
    which: tuple[str, ...],
    same_libraries: bool,
) -> dict[str, tuple[str, str]]:
    """Of the fingerprint, by key path, as it is in the file and in this run. `same_libraries`: else
    layers may have other fields by now, and functions be written in another way: only those fields
    are compared that both have."""
    differ = {}
    for what in which:
        old, new = _facts_of(what, saved, config)
        for path in {**old, **new}:
            if not same_libraries and (path not in old or path not in new or is_held(path)):
                continue
            pair = old.get(path, "nothing"), new.get(path, "nothing")
            if not agree(*pair):
                differ[f"{what}{path}"] = pair
    return dict(list(differ.items())[:_TOLD])


def _facts_of(what: str, *configs: dict[str, Any]) -> list[dict[str, str]]:
    return [config.get("fingerprint", {}).get(what, {}) for config in configs]


def as_asked(
    path: Path, state: TrainState, like: TrainState, saved: dict[str, Any], config: dict[str, Any]
) -> TrainState:
    """`state`, but with the numbers of the outer optimizer that this run asks for, where it asks
    for others than the saved run did: `optax.inject_hyperparams` keeps them in the state, and a
    rate that it has shall be no more fixed than that of a plain optimizer."""
    old, new = _facts_of("asked", saved, config)
    changed = {name for name in new if name in old and not agree(old[name], new[name])}
    if not changed:
        return state
    told = []

    def choose(key_path: Any, restored: Any, asked: Any) -> Any:
        name = jax.tree_util.keystr(key_path)
        if name not in changed:
            return restored
        numbers = f"{np.asarray(restored)!s} in the file, and {np.asarray(asked)!s} is taken"
        told.append(f"{name} is {numbers} from here on")
        return asked

    state = jax.tree_util.tree_map_with_path(choose, state, like)
    warn(f"The optimizer of this run has other numbers than `{path}`: {'; '.join(told)}.")
    return state


def tell_of_other_bits(
    path: Path, versions: dict[str, str], saved: dict[str, Any], config: dict[str, Any]
) -> None:
    """Two figures are the same to the bit only where both were computed in the same way."""
    there, here = _facts_of("computed", saved, config)
    old, new = {**versions, **there}, {**library_versions(), **here}
    names = [name for name in new if name != "python" and old.get(name) != new[name]]
    differ = [f"{name} {old.get(name)}, now {new[name]}" for name in names]
    if differ:
        warn(
            f"`{path}` was computed with {'; '.join(differ)}. So what follows equals an "
            "uninterrupted run up to rounding, and not to the bit."
        )
