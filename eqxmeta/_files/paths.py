"""Folders, and files that a run appends to."""

import contextlib
import errno
import os
import weakref
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from .._errors import explain, in_use
from .patience import sync_file


def make_folder(folder: Path) -> list[Path]:
    """Make `folder`, and those above it that do not exist; returns the new ones, the innermost
    first. They are on the disk: what is synced into them later is not lost with a folder whose own
    entry was not."""
    missing = []
    for candidate in (folder, *folder.parents):
        if candidate.exists():
            break
        missing.append(candidate)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for new in missing:
            sync_folder(new.parent)
    except BaseException:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those that nothing has been put into; the innermost must come first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


# How file systems (of networks, of user space) say that they have no such thing as a folder's sync.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def sync_folder(folder: Path) -> None:
    """Until the entries of `folder` (what is in it, under which names) are on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one that may be written to and not read: there is no way
        return
    try:
        sync_file(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def drop_cached(path: Path) -> None:
    """Ask the system to serve the next reader of `path`, which has been synced, from the disk: what
    it keeps in memory is what was written, and says nothing of what arrived. Best effort: some
    systems do not know this request, and some file systems live in memory."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # for a pipe nobody waits
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def open_shared(path: Path) -> int:
    """A descriptor of `path`, which is made if it does not exist. For reading alone if it is
    another user's, which is enough to lock it. Raises `PermissionError` if there is no way."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError as refused:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # it is the folder that does not let us
            raise refused from None
        except OSError as error:
            message, received = f"{path.parent} cannot be locked.", f"{path}: {error.strerror}"
            expected = "a file that can be opened. If the run that made it has ended, remove it"
            raise PermissionError(explain(message, received, expected)) from error


class OwnFile:
    """The file at `path`, which one run appends to; `CheckpointInUse` if somebody has meanwhile
    moved, replaced or shortened it.

    It is open for writing only meanwhile, so nothing is left to be closed after an error; what was
    written survives the end of the process, and after `sync` that of the machine.
    """

    def __init__(self, path: Path):
        self.path = path
        # Kept open: else another file might get the number by which this one is known.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def write_at(self, offset: int, data: bytes) -> None:
        """Let the file end with `data`, from byte `offset` on. If the disk is full it ends at
        `offset`, not in the middle of a record."""
        with self._opened(offset) as file:
            file.seek(offset)
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(offset)
                raise
            file.truncate()

    def sync(self) -> None:
        with self._opened() as file:
            sync_file(file.fileno())

    @contextlib.contextmanager
    def _opened(self, size: int = 0) -> Iterator[FileIO]:
        received = "another file in its place"
        try:
            with open(self.path, "r+b", buffering=0) as file:
                if os.path.sameopenfile(file.fileno(), self._descriptor):
                    received = "a file that somebody has shortened"
                    if os.fstat(file.fileno()).st_size >= size:
                        yield file
                        return
        except FileNotFoundError:
            received = "no file in its place"
        raise in_use(self.path, received)


def set_aside(path: Path) -> Path:
    """Rename `path`, whose place a run is about to take, to `<name>.stale`; nothing is lost."""
    return path.rename(stale_name(path))


def stale_name(path: Path) -> Path:
    """A name beside `path` that is free: `<name>.stale`, `<name>.stale-1`, ..."""
    stale = first = path.with_name(f"{path.name}.stale")
    count = 1
    while stale.exists():
        stale, count = first.with_name(f"{first.name}-{count}"), count + 1
    return stale
