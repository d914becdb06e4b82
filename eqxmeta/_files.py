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
