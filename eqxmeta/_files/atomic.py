"""Files that are written at one stroke: whole, or not at all."""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .paths import sync_folder
from .patience import hurried, sync_file

_SILENCE = 3600.0  # seconds after which a file that grows no more has no writer


@contextmanager
def replacing(path: Path, before: Callable[[], object] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write into, that becomes `path` when the block ends well and vanishes otherwise.

    It is on the disk before it has the name. Only where the process is to end, and there is no such
    file yet, the name comes first: the disk may take longer than the process is given. It
    belongs to whom `path` belongs, and who may read that may read this. `before` is called when it
    lacks no more than its name: what that raises leaves everything as it was.
    """
    path = Path(os.path.realpath(path))  # through a symbolic link: it stays one
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            _be_like(path, file)
            yield file
            file.flush()
            named = hurried() and not path.exists()
            if named:
                before()
                os.replace(temporary, path)
            sync_file(file.fileno())
        if not named:
            before()
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _be_like(path: Path, file: BinaryIO) -> None:
    with suppress(OSError):  # there is no such file yet, or a file system that knows no modes
        found = os.stat(path)
        os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
        os.fchown(file.fileno(), found.st_uid, found.st_gid)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of `replacing`, for paths whose name matches `pattern`."""
    for temporary in folder.glob(f".{pattern}.*.tmp"):
        with suppress(OSError), open(temporary, "rb") as file:
            if _lock(file):
                temporary.unlink()


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else is writing `file`. The lock ends with its process, however that ends.
    Where there are no locks, nobody is who has written nothing for an hour."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(file.fileno()).st_mtime > _SILENCE
    return True
