"""TensorBoard's event files, written synchronously; what is in them is never changed."""

import importlib
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import explain, warn
from .paths import OwnFile, sync_folder

_LONGEST = 1 << 30  # bytes of a record, of which the longest are pictures


class EventFile:
    """A new event file, which TensorBoard reads after all that are in `folder` already. What `add`
    took is in it once `flush` returns.

    Not tensorboardX's `EventsWriter`: it names files by the clock and opens them for overwriting,
    so that a run that is resumed within a second empties the file of the one before; and it knows
    no other `flush` than one that waits for the disk.
    """

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names, and never goes back. So a name is
        # later than all others, also if the clock has been set back.
        stamps = (re.search(r"tfevents\.([0-9]{1,150})", name) for name in event_files(folder))
        stamp = max([f"{int(time.time()):010d}", *(_after(x[1]) for x in stamps if x)])
        self.path = folder / f"events.out.tfevents.{stamp}.{socket.gethostname()}"
        self.path.touch(exist_ok=False)
        self._file = OwnFile(self.path)
        self._is_entered = False
        self.size = 0
        self._pending: list[bytes] = []
        self._add(file_version="brain.Event:2")

    def add(self, step: int, values: Sequence[Any], wall_time: float | None = None) -> None:
        """One event: all values of a step, each a `Summary.Value`."""
        if values:
            summary = proto("summary").Summary(value=values)
            self._add(wall_time, step=step, summary=summary)

    def forget(self, step: int) -> None:
        """Let TensorBoard drop what it has read of steps from `step` on."""
        log = proto("event").SessionLog
        self._add(step=step, session_log=log(status=log.START))

    def flush(self) -> None:
        """Hand everything over to the operating system."""
        data = b"".join(self._pending)
        self._file.write_at(self.size, data)
        self.size += len(data)
        self._pending.clear()

    def sync(self) -> None:
        """Until what was flushed is on the disk, and the file's entry, with which it would go."""
        self._file.sync()
        if not self._is_entered:
            sync_folder(self.path.parent)
            sync_folder(self.path.parent.parent)
            self._is_entered = True

    def _add(self, wall_time: float | None = None, **content: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        wall_time = time.time() if wall_time is None else wall_time
        event = proto("event").Event(wall_time=wall_time, **content).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._pending += [part, struct.pack("<I", masked_crc32c(part))]


def _after(digits: str) -> str:
    """The next number that is later than `digits` as text, where 10 comes before 9."""
    following = str(int(digits) + 1).zfill(len(digits))
    return following if len(following) == len(digits) else f"{digits}0"


def event_files(folder: Path) -> list[str]:
    """The names of all files in `folder` that TensorBoard reads."""
    return [path.name for path in folder.glob("*tfevents*")]


def unreadable(path: Path) -> str | None:
    """Why TensorBoard reads no more of the folder that holds `path`: that is no event file, or not
    as it was written. A record that is torn off at the end is no reason."""
    parse = proto("event").Event.FromString
    try:
        with open(path, "rb") as file:
            while len(head := file.read(12)) == 12:
                (length,) = struct.unpack_from("<Q", head)
                if length > _LONGEST:
                    return f"a record of {length:,} bytes"
                event = file.read(length + 4)
                if len(event) == length + 4:
                    parse(event[:length])
    except Exception as error:  # of the system, or of the parser
        return str(error)
    return None


def tell_missing(folder: Path, told: Mapping[str, Mapping[str, int]], last: int) -> None:
    """Warn of files that `told` has, with the steps up to `last`, and that are gone or shorter."""
    begins = sorted(file.get("begin", 1) for file in told.values())
    for name, file in told.items():
        path, begin, size = folder / name, file.get("begin", 1), file.get("bytes", 0)
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            end = min([b - 1 for b in begins if b > begin], default=last)
            received = f"{name} of {found:,} bytes" if path.exists() else f"no {name}"
            expected = f"{size:,} bytes, with the steps {begin}-{min(end, last)}. The run goes on"
            warn(explain(f"The log {folder} lacks events.", received, f"{expected} without them"))


def proto(name: str) -> Any:
    """A module of TensorBoard's protocol buffers as tensorboardX supplies them. It is imported when
    it is used, for tensorboardX imports torch wherever that is installed."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")
