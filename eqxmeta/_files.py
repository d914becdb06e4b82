import os
import shutil
from pathlib import Path

from ._errors import explain, warn


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
    return path.rename(_stale(path, name))


def keep_damaged(path: Path, name: str | None = None) -> None:
    """Copy the log `path`, of which only what is sound will stay, to `<name>.stale`, and warn."""
    stale = _stale(path, name)
    shutil.copyfile(path, stale)
    received = "records that are not as they were written, and not only at its end"
    expected = f"sound records. They stay; all of it as it was is in {stale}"
    warn(explain(f"The log {path} is damaged.", received, expected))


def warn_short(path: Path, newest: int, start: int) -> None:
    """Warn that the log `path` ends at step `newest`, long before the run goes on from `start`."""
    expected = f"a row up to step {start}, from which the run goes on: those between are lost"
    warn(explain(f"The log {path} is short.", f"step {newest} as the newest", expected))


def _stale(path: Path, name: str | None) -> Path:
    stale = first = path.with_name(f"{name or path.name}.stale")
    count = 1
    while stale.exists():
        stale, count = first.with_name(f"{first.name}-{count}"), count + 1
    return stale
