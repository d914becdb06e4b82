"""A folder, or a file, of which one process at a time is the owner."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from weakref import WeakSet

from .._errors import CheckpointInUse, explain, warn
from .paths import make_folder, open_shared, remove_empty

_files = WeakSet[FileIO]()  # closed in every fork: it would hold the locks beyond its parent's end
os.register_at_fork(after_in_child=lambda: [file.close() for file in _files])


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Own `folder`, which is made if it does not exist, for the length of the block.

    The lock is the operating system's, on the file `name` in it: it ends with its process, however
    that ends. Afterwards the file is gone, and so are folders that were made and got no content.

    Raises `CheckpointInUse` if it is owned, also by this process; `OSError` if it cannot be."""
    made, path = make_folder(folder), folder / name
    try:
        file = _lock(path)
        try:
            yield
        finally:
            with suppress(OSError, ValueError), file:  # ValueError: closed, as this is a fork
                if os.path.samefile(path, file.fileno()):
                    path.unlink()
    finally:
        remove_empty(made)


def file_locked(path: Path) -> AbstractContextManager[None]:
    """As `locked`, but own the file `path` alone, by whatever links it is reached."""
    real = Path(os.path.realpath(path))
    return locked(real.parent, f".{real.name}.lock")


def _lock(path: Path) -> FileIO:
    _files.add(file := FileIO(open_shared(path), "r+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samefile(path, file.fileno()):
            raise FileNotFoundError  # as does `samefile`: the owner removed it, after it was opened
    except (BlockingIOError, FileNotFoundError):
        with file:
            owner = f"a lock of {file.read(99).decode(errors='replace').strip() or 'somebody else'}"
        expected = "a folder for each run, or to wait until the other one has ended"
        raise CheckpointInUse(explain(f"{path.parent} is in use.", owner, expected)) from None
    except OSError as error:
        warn(f"The file system of {path.parent} knows no locks: only one may use it. ({error})")
    with suppress(OSError):  # for the message above; a full disk is no reason to stop
        file.truncate(file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode()))
    return file
