"""A file of arrays that is either whole or refused: one stored zip, written at one stroke.

The layout, format 1: members `leaves/00000.npy`, ... in NumPy's own format, then `manifest.json`
with the size and sha256 of each, and in the zip comment the sha256 of the manifest. Nothing is
pickled, nothing is compressed; `unzip` and `numpy.load` can read it without us.
"""

import errno
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointTooNew,
    explain,
)
from .._files.atomic import replacing

FORMAT = 1
_MANIFEST = "manifest.json"
_COMMENT = b"eqxmeta sha256 "


def write(
    path: Path, leaves: Iterable[tuple[dict[str, Any], np.ndarray]], fields: dict[str, Any]
) -> None:
    """Write `leaves`, each an array with its entry of the manifest, and the manifest's `fields`.

    `leaves` is consumed one at a time. `path` keeps its old content until the new one is on disk.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        entries = []
        for index, (entry, array) in enumerate(leaves):
            array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            parts = npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data
            name = f"leaves/{index:05}.npy"
            size, digest = _add(archive, name, parts)
            entries.append({**entry, "file": name, "bytes": size, "sha256": digest})
        manifest = json.dumps({"format": FORMAT, **fields, "leaves": entries}, indent=1)
        _, digest = _add(archive, _MANIFEST, [manifest.encode()])
        archive.comment = _COMMENT + digest.encode()


def _add(archive: zipfile.ZipFile, name: str, parts: Iterable[bytes | memoryview]):
    parts = tuple(parts)
    info = zipfile.ZipInfo(name)  # its date is constant: the same state gives the same bytes
    info.external_attr = 0o644 << 16
    info.file_size = sum(len(part) for part in parts)
    digest = hashlib.sha256()
    with archive.open(info, "w") as member:
        for part in parts:
            digest.update(part)
            member.write(part)
    return info.file_size, digest.hexdigest()


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The start of a `.npy` of version 1.0. Ours rather than NumPy's, which may change its padding:
    so a reader that knows shape and dtype can compare it and need not parse anything."""
    descr = dtype.newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


class Reader:
    """An open file whose manifest matches its checksum, and whose members match the manifest."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int):
        self.path = path
        self._archive = archive
        self._sizes = _member_sizes(archive, size)
        self.manifest = self._read_manifest()

    def read(self, entry: dict[str, Any]) -> bytes:
        """The bytes of one leaf. Raises `CheckpointCorrupt` if they are not as written."""
        with damage_of(self.path, entry["path"]):
            # Nothing is allocated for a size that the file cannot hold: see `_member_sizes`.
            data = self._archive.read(entry["file"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError("bytes that do not match their sha256")
            return data

    def array(self, entry: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """One leaf, which must have this shape and dtype; read-only, without a copy."""
        with damage_of(self.path, entry["path"]):
            header = npy_header(shape, dtype)
            if self._sizes[entry["file"]] != len(header) + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"a size that is not that of {dtype.name}{list(shape)}")
        data = self.read(entry)
        with damage_of(self.path, entry["path"]):
            if not data.startswith(header):
                raise ValueError(f"a header that is not that of {dtype.name}{list(shape)}")
            flat = np.frombuffer(data, dtype.newbyteorder("<"), offset=len(header))
            return flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape)

    def _read_manifest(self) -> dict[str, Any]:
        if _MANIFEST not in self._sizes:
            raise ValueError("no manifest")
        data = self._archive.read(_MANIFEST)
        if self._archive.comment != _COMMENT + hashlib.sha256(data).hexdigest().encode():
            raise ValueError("a manifest that does not match its sha256")
        manifest = json.loads(data)
        version = manifest["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
        if version > FORMAT:
            message = f"{self.path} was written by a newer eqxmeta."
            received = f"format {version}, versions {manifest.get('versions')}"
            expected = f"format {FORMAT} or older. Upgrade eqxmeta"
            raise CheckpointTooNew(explain(message, received, expected))
        if type(manifest["meta"]) is not dict:
            raise ValueError("a manifest without `meta`")
        wanted = {_MANIFEST: len(data)}
        for leaf in manifest["leaves"]:
            strings = [leaf["path"], leaf["dtype"], leaf["file"], leaf["sha256"]]
            if not all(type(value) is str for value in strings):
                raise ValueError("a manifest whose leaves are not described by strings")
            if not all(type(n) is int and n >= 0 for n in [leaf["bytes"], *leaf["shape"]]):
                raise ValueError("a manifest with sizes that are none")
            wanted[leaf["file"]] = leaf["bytes"]
        if len(wanted) != 1 + len(manifest["leaves"]) or wanted != self._sizes:
            raise ValueError("members that are missing, unexpected or of a wrong size")
        return manifest


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open `path`. Raises `CheckpointNotFound`, `CheckpointCorrupt` or `CheckpointTooNew`."""
    if not path.is_file():
        received = "a folder" if path.is_dir() else "no such file"
        message = f"There is no checkpoint at {path}."
        raise CheckpointNotFound(explain(message, received, "a file written by `save`"))
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            received = f"a file that begins with {file.seek(0) or file.read(20)!r}"
            expected = "a file written by `save`, which is a zip archive"
            message = f"{path} is not a checkpoint, or damaged from its first byte on."
            raise CheckpointCorrupt(explain(message, received, expected))
        with damage_of(path):
            archive = zipfile.ZipFile(file)
            reader = Reader(path, archive, os.fstat(file.fileno()).st_size)
        with archive:
            yield reader


def _member_sizes(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    infos = archive.infolist()
    sizes = {info.filename: info.file_size for info in infos}
    if len(sizes) != len(infos):
        raise ValueError("two members of one name")
    if any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in infos):
        raise ValueError("a compressed member")
    if sum(sizes.values()) > size:
        raise ValueError(f"members of {sum(sizes.values())} bytes in a file of {size}")
    return sizes


@contextmanager
def damage_of(path: Path, leaf: str | None = None) -> Iterator[None]:
    """Whatever the parsers trip over is damage; a failing disk or a lack of memory is not."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # zipfile seeks to wherever a damaged directory points: EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        where = "" if leaf is None else f", in its leaf {leaf!r}"
        message, received = f"Checkpoint {path} is damaged{where}.", str(error)
        expected = "the bytes that `save` wrote. Use an older checkpoint, or a copy of this one"
        received = received or type(error).__name__
        raise CheckpointCorrupt(explain(message, received, expected)) from error
