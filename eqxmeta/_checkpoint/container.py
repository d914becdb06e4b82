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
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from .._errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    explain,
)
from .._files.atomic import replacing
from .._files.disk import is_absence, is_damage
from .dtypes import KEY_BITS, KEY_SHAPES, dtype_of, names_key, stored_dtype
from .manifest import FORMAT, MOST_BYTES, check_manifest

_MANIFEST = "manifest.json"
_COMMENT = b"eqxmeta sha256 "
_BLOCK = 1 << 20  # bytes that are read at a time
# Of the zip's directory, which `zipfile` reads at once: as many members as a manifest has room for.
_DIRECTORY = MOST_BYTES // 2


def write(
    path: Path,
    leaves: Iterable[tuple[dict[str, Any], np.ndarray]],
    fields: dict[str, Any],
    before: Callable[[], object],
) -> None:
    """Write `leaves`, each an array with its entry of the manifest, and the manifest's `fields`.

    `leaves` is consumed one at a time. `path` keeps its old content until the new one is on disk,
    and `before` has been called.
    """
    with replacing(path, before) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        entries = []
        for index, (entry, array) in enumerate(leaves):
            array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            parts = npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data
            name = f"leaves/{index:05}.npy"
            size, digest = _add(archive, name, parts)
            entries.append({**entry, "file": name, "bytes": size, "sha256": digest})
        manifest = json.dumps({"format": FORMAT, **fields, "leaves": entries}, indent=1).encode()
        if len(manifest) > MOST_BYTES:
            message = f"The manifest of {path} would be too large."
            received = f"{len(manifest):,} bytes: {len(entries):,} leaves, and `meta`"
            raise ValueError(explain(message, received, f"{MOST_BYTES:,} bytes at most"))
        _, digest = _add(archive, _MANIFEST, [manifest])
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

    def check(self, entry: dict[str, Any]) -> None:
        """Read one leaf, and keep nothing. Raises `CheckpointCorrupt` if it is not as written, and
        not what the manifest says of it."""
        with damage_of(self.path, entry["path"]):
            if names_key(entry["dtype"]):
                self._check_keys(entry)
                return
            form = tuple(entry["shape"]), stored_dtype(dtype_of(entry["dtype"]))
            for _ in self._data(entry, *form):
                pass

    def array(self, entry: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """One leaf, which must have this shape and dtype: the only copy of it."""
        with damage_of(self.path, entry["path"]):
            blocks = self._data(entry, shape, dtype)
            next(blocks)  # nothing is allocated for a size that the file does not have
            array = np.empty(math.prod(shape), dtype.newbyteorder("<"))
            room, end = array.view(np.uint8).data, 0
            for block in blocks:
                room[end : end + len(block)] = block
                end += len(block)
            return array.astype(dtype.newbyteorder("="), copy=False).reshape(shape)

    def _data(
        self, entry: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype
    ) -> Iterator[bytes]:
        """The header of a leaf of this shape and dtype, and then the rest."""
        header, form = npy_header(shape, dtype), f"{dtype.name}{list(shape)}"
        if self._sizes[entry["file"]] != len(header) + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"a size that is not that of {form}")
        blocks = self._blocks(entry["file"], len(header), entry["sha256"])
        if (first := next(blocks)) != header:
            raise ValueError(f"a header that is not that of {form}")
        yield first
        yield from blocks

    def _check_keys(self, entry: dict[str, Any]) -> None:
        """Each key is some numbers. Of a generator of one's own the header tells how many."""
        each, whole = KEY_SHAPES.get(entry["dtype"]), tuple(entry["shape"])
        if each is None:
            with self._archive.open(entry["file"]) as member:
                np.lib.format.read_magic(member)
                shape, _, _ = np.lib.format.read_array_header_1_0(member)
            each = tuple(map(abs, shape[len(whole) :]))
        for _ in self._data(entry, (*whole, *each), KEY_BITS):
            pass

    def _blocks(self, name: str, first: int, digest: str) -> Iterator[bytes]:
        """A member in parts, the first of that size. Raises at the end if the sum is wrong."""
        found = hashlib.sha256()
        with self._archive.open(name) as member:
            size = first
            while block := member.read(size):
                found.update(block)
                yield block
                size = _BLOCK
        if found.hexdigest() != digest:
            raise ValueError(f"bytes in {name} that do not match their sha256")

    def _read_manifest(self) -> dict[str, Any]:
        if _MANIFEST not in self._sizes:
            raise ValueError("no manifest")
        if self._sizes[_MANIFEST] > MOST_BYTES:
            raise ValueError(f"a manifest of {self._sizes[_MANIFEST]:,} bytes")
        if not (comment := self._archive.comment).startswith(_COMMENT):
            raise ValueError("a manifest without its sha256")
        data = b"".join(self._blocks(_MANIFEST, _BLOCK, comment[len(_COMMENT) :].decode()))
        manifest = json.loads(data)
        sizes = check_manifest(manifest, self.path)
        if {_MANIFEST: len(data), **sizes} != self._sizes:
            raise ValueError("members that are missing, unexpected or of a wrong size")
        return manifest


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open `path`. Raises `CheckpointNotFound`, `CheckpointCorrupt` or `CheckpointTooNew`."""
    with damage_of(path):
        file = _open(path)
    with file:
        with damage_of(path):
            begin = file.read(20)
            if not begin.startswith(b"PK"):
                raise ValueError(f"a file that begins with {begin!r}, and is no zip archive")
            archive = zipfile.ZipFile(cast(BinaryIO, _Bounded(file)))
            reader = Reader(path, archive, os.fstat(file.fileno()).st_size)
        with archive:
            yield reader


def _open(path: Path) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, a device or a pipe")
    return open(path, "rb")


class _Bounded:
    """A file of which nobody reads much at a time: `zipfile` reads a directory of any size."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY:
            raise ValueError(f"a directory of {size:,} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
    """Whatever the parsers trip over is damage, and so is what the disk cannot give back; a file
    that is not there is absent; every other error of the system, and a lack of memory, says
    nothing of the file, and stays what it is."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if is_absence(error):
            received = (getattr(error, "strerror", None) or str(error)).lower()
            message, expected = f"There is no checkpoint at {path}.", "a file written by `save`"
            raise CheckpointNotFound(explain(message, received, expected)) from error
        # `zipfile` seeks to wherever a damaged directory points: EINVAL.
        is_parsers = not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)
        if not (is_parsers or is_damage(error)):
            raise
        where = "" if leaf is None else f", in its leaf {leaf!r}"
        message, received = f"Checkpoint {path} is damaged{where}.", str(error)
        expected = "the bytes that `save` wrote. Use an older checkpoint, or a copy of this one"
        received = received or type(error).__name__
        raise CheckpointCorrupt(explain(message, received, expected)) from error
