"""A look into a checkpoint without a model at hand."""

import json
import os
from typing import Any

import numpy as np

from .._arguments import check_path
from .._errors import printable, tell
from . import container as _container
from .names import refuse_folder
from .save_load import read_alone

_BLOCK = 1 << 18  # numbers that are looked at together


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
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    _tell(f"{path}: format {manifest['format']}, {len(rows)} leaves, sound")
    _tell(f"versions  {versions}")
    for name, value in manifest["meta"].items():
        _tell(f"{name:9} {json.dumps(value)}")
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for name, dtype, size, values in rows:
        _tell(f"{name:{widths[0]}}  {dtype:{widths[1]}}  {size:>{widths[2]}}  {values}".rstrip())
    return manifest


def _tell(line: str) -> None:
    tell(printable(line))  # what is in it may be anybody's


def _form(leaf: dict[str, Any]) -> tuple[str, str, str]:
    shape = ",".join(map(str, leaf["shape"]))
    return leaf["path"], f"{leaf['dtype']}[{shape}]", f"{leaf['bytes']:,} B"


def _values(array: np.ndarray | None) -> str:
    """The values' range, of the kinds that have one: enough to see zeros, NaN and blow-ups."""
    if array is None or array.size == 0 or array.dtype.kind == "c":
        return ""
    flat = array.reshape(-1)
    if flat.size == 1:
        return str(_wide(flat)[0])
    bad, lows, highs = 0, [], []
    for start in range(0, flat.size, _BLOCK):
        block = _wide(flat[start : start + _BLOCK])
        finite = block[np.isfinite(block)]
        bad += block.size - finite.size
        if finite.size:
            lows.append(finite.min())
            highs.append(finite.max())
    text = f"{min(lows):.4g} to {max(highs):.4g}" if lows else ""
    return f"{text}, {bad} not finite".lstrip(", ") if bad else text


def _wide(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind in "iu" else array.astype(np.float64)
