"""A folder, or a file, of which one process at a time is the owner."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from weakref import WeakSet

from .._errors import CheckpointInUse, in_use, warn
from .paths import make_folder, open_shared, remove_empty

_files = WeakSet[FileIO]()  # closed in a fork, which would hold the locks beyond its parent's end
os.register_at_fork(after_in_child=lambda: [file.close() for file in _files])


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[Callable[[], None]]:
    """Own `folder`, made if it does not exist, for the block: `CheckpointInUse` if somebody does.
    The block calls what it is given before each change: so too if the folder has been exchanged.
    The system's lock, on file `name`, ends with its process. Then it and new empty folders go."""
    made, path = make_folder(folder), folder / name
    try:
        file = _lock(path)
        try:
            yield lambda: _check(path, file)
        finally:
            with suppress(OSError, ValueError, CheckpointInUse), file:
                _check(path, file)
                path.unlink()
    finally:
        remove_empty(made)


def file_locked(path: Path) -> AbstractContextManager[Callable[[], None]]:
    """As `locked`, but own the file `path` alone, by whatever links it is reached."""
    return locked((real := Path(os.path.realpath(path))).parent, f".{real.name}.lock")


def _check(path: Path, file: FileIO) -> None:
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # closed, as this is a fork
        if os.path.samefile(path, file.fileno()):
            return
    raise in_use(path.parent, "another folder, or none, in the place of the one that is locked")


def _lock(path: Path) -> FileIO:
    _files.add(file := FileIO(open_shared(path), "r+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check(path, file)  # its owner may have removed it after it was opened
    except (BlockingIOError, CheckpointInUse):
        with file:
            owner = file.read(99).decode(errors="replace").strip() or "somebody else"
        raise in_use(path.parent, f"a lock of {owner}") from None
    except OSError as error:
        warn(f"The file system of {path.parent} knows no locks: only one may use it. ({error})")
    with suppress(OSError):  # for the message above; a full disk is no reason to stop
        file.truncate(file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode()))
    return file
