"""What a run says of itself in the `meta` of its checkpoints, and the types that this must have."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from .._errors import CheckpointCorrupt, explain
from . import container as _container

# By name, where a run says anything of the name.
_TYPES = {
    "step": int,
    "file": str,
    "run": str,
    "config": dict[str, Any],
    "skipped": int,
    "skipped_in_a_row": int,
    "callbacks": dict[str, dict[str, Any]],
    "monitored": dict[str, Any] | None,
}
_OF_MONITORED = {"name": str, "mode": str, "value": int | float | None, "at_end": bool}
_OF_CONFIG = {"fingerprint": dict[str, dict[str, str]]}


def read_run(path: Path) -> dict[str, Any]:
    """The manifest of a run's checkpoint. What it says of the run has the right types, so that no
    reader of it need ask: else `CheckpointCorrupt`. Raises what `read_manifest` raises, too."""
    with _container.reading(path) as reader:
        manifest = reader.manifest
    meta = manifest["meta"]
    check_types(path, meta, _TYPES)
    check_types(path, meta.get("config", {}), _OF_CONFIG)
    if monitored := meta.get("monitored"):
        check_types(path, {**dict.fromkeys(_OF_MONITORED), **monitored}, _OF_MONITORED)
    if any(meta.get(name, 0) < 0 for name in ("step", "skipped", "skipped_in_a_row")):
        raise corrupt(path, "a number of steps below 0")
    return manifest


def check_types(path: Path, found: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raises `CheckpointCorrupt` if something in `path` has another type than that of its name."""
    for name, kind in types.items():
        if name in found and not _is(found[name], kind):
            raise corrupt(path, f"{name}={json.dumps(found[name])[:100]}")


def corrupt(path: Path, received: str) -> CheckpointCorrupt:
    message = f"Checkpoint {path} is damaged, or not of a run."
    return CheckpointCorrupt(explain(message, received, "what a run says of itself"))


def _is(value: Any, kind: Any) -> bool:
    """Of JSON: `True` is no number."""
    if isinstance(kind, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if get_origin(kind) is not dict:
        return kind is Any or (isinstance(value, kind) and (type(value) is bool) == (kind is bool))
    return type(value) is dict and all(_is(x, get_args(kind)[1]) for x in value.values())
