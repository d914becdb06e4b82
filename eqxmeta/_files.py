"""Writing files so that a crash never leaves half a file behind."""

import os
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Give `path` the content `data`: after a crash it holds the old content or the new."""
    # In the same folder, because a rename does not cross file systems.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_at(path: Path, offset: int, data: bytes, *, sync: bool = False) -> None:
    """Let the existing file `path` end with `data`, from byte `offset` on.

    The file is open only meanwhile, so nothing is left to be closed after an error; what was
    written survives the end of the process, and with `sync` that of the machine. If the disk is
    full the file ends at `offset`, not in the middle of a record.
    """
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(offset)
            raise
        file.truncate()
        if sync:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # The rename itself is on disk only when the folder is. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
