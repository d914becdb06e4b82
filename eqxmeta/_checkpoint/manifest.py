"""The manifest: what a checkpoint says of itself, checked before anything in it is used."""

import importlib.metadata
import math
import platform
from pathlib import Path
from typing import Any

from .._arguments import check_json
from .._errors import CheckpointTooNew, explain
from .dtypes import DTYPES, dtype_of, names_key

FORMAT = 1
_LIBRARIES = ("eqxmeta", "jax", "equinox", "optax", "numpy")
# Room for 30,000 leaves or more. Parsed, it takes some 25 times as much memory at worst.
MOST_BYTES = 1 << 23
_MOST_DIMENSIONS = 64  # of NumPy's arrays


def check_manifest(manifest: Any, path: Path) -> dict[str, int]:
    """The sizes of the leaves' members, by name. Raises `CheckpointTooNew` for a later format, and
    any other error for a manifest that `save` would not have written."""
    version = manifest["format"]
    if type(version) is not int or version < 1:
        raise ValueError(f"format {version!r}")
    if version > FORMAT:
        raise CheckpointTooNew(
            explain(
                f"{path} was written by a newer eqxmeta.",
                f"format {version}, versions {manifest.get('versions')}",
                f"format {FORMAT} or older. Upgrade eqxmeta",
            )
        )
    if type(manifest["meta"]) is not dict:
        raise ValueError("a manifest without `meta`")
    check_json(manifest["meta"], "meta", 0)  # not deeper than whoever shows it can go
    versions = manifest["versions"]
    if type(versions) is not dict or not all(type(x) is str for x in versions.values()):
        raise ValueError("a manifest without `versions`")
    if type(manifest["leaves"]) is not list:
        raise ValueError("a manifest without `leaves`")
    sizes: dict[str, int] = {}
    for leaf in manifest["leaves"]:
        strings = [leaf["path"], leaf["dtype"], leaf["file"], leaf["sha256"]]
        if not all(type(value) is str for value in strings):
            raise ValueError("a manifest whose leaves are not described by strings")
        _check_form(leaf["dtype"], leaf["shape"], leaf["path"])
        if type(leaf["bytes"]) is not int:
            raise ValueError("a manifest with a size that is not a number")
        sizes[leaf["file"]] = leaf["bytes"]
    for what in ("path", "file"):
        if len({leaf[what] for leaf in manifest["leaves"]}) != len(manifest["leaves"]):
            raise ValueError(f"two leaves of one {what}")
    return sizes


def _check_form(dtype: str, shape: Any, path: str) -> None:
    if not names_key(dtype) and dtype not in DTYPES:
        raise ValueError(f"the dtype {dtype!r} of leaf {path!r}, which no checkpoint holds")
    sound = type(shape) is list and len(shape) <= _MOST_DIMENSIONS
    if not (sound and all(type(n) is int and 0 <= n < 2**63 for n in shape)):
        raise ValueError(f"a shape of leaf {path!r} that is malformed")
    # As NumPy counts: also where one of them is 0.
    itemsize = 64 if names_key(dtype) else dtype_of(dtype).itemsize
    if itemsize * math.prod(n or 1 for n in shape) >= 2**63:
        raise ValueError(f"a shape of leaf {path!r} too large for any array")


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # run from a folder, never installed
            versions[library] = "unknown"
    return versions
