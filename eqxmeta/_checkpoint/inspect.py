"""A look into a checkpoint without a model at hand."""

import json
import os
from typing import Any

import numpy as np

from .._arguments import check_path
from .._errors import tell
from . import container as _container
from .names import refuse_folder
from .save_load import read_alone


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Print what is in a checkpoint: its manifest and, of every leaf, key path, dtype, shape, size
    and range of values. No model is needed. Returns the manifest.

    Every byte is checked. Raises `CheckpointNotFound`, `CheckpointCorrupt`, `CheckpointTooNew`.
    """
    path = check_path(path, "inspect(path=...)")
    refuse_folder(path)
    # All of it before the first line, so that of a damaged file nothing is shown as if it were.
    with _container.reading(path) as reader:
        manifest = reader.manifest
        rows = [(*_form(leaf), _values(read_alone(reader, leaf))) for leaf in manifest["leaves"]]
    told = manifest.get("versions")  # sound, but perhaps of another writer than ours
    versions = told.items() if isinstance(told, dict) else ()
    tell(f"{path}: format {manifest['format']}, {len(rows)} leaves, sound")
    tell(f"versions  {', '.join(f'{library} {version}' for library, version in versions)}")
    for name, value in manifest["meta"].items():
        tell(f"{name:9} {json.dumps(value)}")
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for name, dtype, size, values in rows:
        tell(f"{name:{widths[0]}}  {dtype:{widths[1]}}  {size:>{widths[2]}}  {values}".rstrip())
    return manifest


def _form(leaf: dict[str, Any]) -> tuple[str, str, str]:
    shape = ",".join(map(str, leaf["shape"]))
    return leaf["path"], f"{leaf['dtype']}[{shape}]", f"{leaf['bytes']:,} B"


def _values(array: np.ndarray | None) -> str:
    """The values' range, of the kinds that have one: enough to see zeros, NaN and blow-ups."""
    if array is None or array.size == 0 or array.dtype.kind == "c":
        return ""
    wide = array if array.dtype.kind in "iu" else array.astype(np.float64)
    if wide.size == 1:
        return str(wide.reshape(-1)[0])
    bad = int(wide.size - np.isfinite(wide).sum())
    finite = wide[np.isfinite(wide)]
    text = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else ""
    return f"{text}, {bad} not finite".lstrip(", ") if bad else text
