import os
from pathlib import Path


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


def set_aside(path: Path, name: str | None = None) -> Path:
    """Rename `path`, whose place a run is about to take, to `<name>.stale`; nothing is lost."""
    stale = first = path.with_name(f"{name or path.name}.stale")
    count = 1
    while stale.exists():
        stale, count = first.with_name(f"{first.name}-{count}"), count + 1
    return path.rename(stale)
