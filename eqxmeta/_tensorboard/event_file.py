"""TensorBoard's event files, written synchronously and cut at any step.

A file is a row of records: length (8 bytes), checksum of the length (4), a serialised `Event`,
its checksum (4). tensorboardX supplies the protocol buffers. Its writers are not used: the
queued one loses what is in the queue when the process is killed, and both spend 20 microseconds
an outer step on the checksum, which a whole chunk of steps can share.
"""

import hashlib
import os
import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._files.atomic import replacing
from .._files.paths import keep_damaged, make_folder, sync_folder, write_at
from . import protobuf as pb

# Below this many rows the checksum in Python is faster than the one in NumPy.
_FEW = 24


# Other writers name their files after time, host, and numbers of their own.
_OWN = re.compile(r"\.\d{4,}\.eqxmeta(\.step-\d+)?$")


class EventFile:
    """A new event file in `folder`. What `add` took is in the file once `flush` returns.

    `suffix` ends its name, for what only we read from it.
    """

    def __init__(self, folder: Path, *, suffix: str = ""):
        make_folder(folder)
        self._path = _create(folder, suffix)
        self._entered = False  # in the folder, as far as the disk knows
        self._size = 0
        self._pending: list[bytes] = []
        self.add(pb.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def add(self, event: Any) -> None:
        data = np.frombuffer(event.SerializeToString(), np.uint8)
        self._pending.append(_framed(data[None]))

    def add_scalars(
        self, tags: Sequence[str], steps: np.ndarray, wall_times: np.ndarray, values: np.ndarray
    ) -> None:
        """One event a row: `steps` and `wall_times` `[rows]`, `values` `[rows, tags]`."""
        self._pending.append(_framed(_scalar_events(tags, steps, wall_times, values)))

    def flush(self, *, sync: bool = False) -> None:
        """Hand everything over to the operating system; with `sync`, to the disk."""
        if not self._pending and not sync:
            return
        data = b"".join(self._pending)
        write_at(self._path, self._size, data, sync=sync)
        self._size += len(data)
        self._pending.clear()
        if sync and not self._entered:
            sync_folder(self._path.parent)
            self._entered = True


def event_files(folder: Path) -> list[Path]:
    """All event files of a run, in the order in which TensorBoard reads them."""
    return sorted(p for p in folder.glob("*tfevents*") if not p.name.startswith("."))


def own_event_files(folder: Path) -> list[Path]:
    """Those among them that `EventFile` wrote; others are not ours to change."""
    return [path for path in event_files(folder) if _OWN.search(path.name)]


def hidden(name: str) -> str:
    """An event file's name, such that TensorBoard, which reads all of `*tfevents*`, does not."""
    return name.replace("tfevents", "events")


def cut(path: Path, step: int) -> int:
    """Forget what `path` tells of outer steps after `step`, and a torn record at its end. Returns
    the newest step that is left, or 0. Warns of other damage, and then leaves a copy."""
    data = path.read_bytes()
    records, damaged = _records(data)
    steps = {(a, b): _step(data[a:b]) for a, b in records}
    kept = [data[a:b] for a, b in records if steps[a, b] <= step]
    if damaged:
        keep_damaged(path, hidden(path.name))
    if not kept:
        path.unlink()
    elif sum(map(len, kept)) < len(data):
        with replacing(path, label=hidden(path.name)) as file:
            file.write(b"".join(kept))
    return max((s for s in steps.values() if s <= step), default=0)


def first_told(folder: Path) -> str | None:
    """A digest of the first that our files tell of an outer step, but for when: by which the log of
    a run is known. `None` if they tell of none."""
    for path in own_event_files(folder):
        with open(path, "rb") as file:
            while len(head := file.read(12)) == 12:
                (size,) = struct.unpack_from("<Q", head)
                if head != _head(size) or len(record := file.read(size + 4)) != size + 4:
                    break
                data = np.frombuffer(record[:-4], np.uint8)
                if record[-4:] != _checksums(data[None]).astype("<u4").tobytes():
                    return None  # damaged: it is not known any more
                event = pb.Event.FromString(record[:-4])
                if event.step > 0 and event.summary.value:
                    told = f"{event.step} ".encode() + event.summary.SerializeToString()
                    return hashlib.sha256(told).hexdigest()[:16]
    return None


def _create(folder: Path, suffix: str) -> Path:
    # TensorBoard reads files in the order of their names and never goes back: the count keeps
    # the order for files of the same second.
    count = len(event_files(folder))
    while True:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        name = f"{name}.{count:04d}.eqxmeta{suffix}"
        try:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            count += 1
        else:
            return folder / name


def _scalar_events(
    tags: Sequence[str], steps: np.ndarray, wall_times: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Serialised `Event`s, uint8 `[rows, size]`: they differ in a few bytes only, at fixed places.

    Field numbers and types are those of tensorboardX's event.proto and summary.proto.
    """
    rows = len(steps)
    summary = b""
    places = []
    for tag in tags:
        name = tag.encode()
        value = b"\x0a" + _varint(len(name)) + name + b"\x15"
        summary += b"\x0a" + _varint(len(value) + 4) + value
        places.append(len(summary))
        summary += bytes(4)
    # Five bytes for the step, whatever its size: a varint may be padded, and 35 bits suffice.
    head = b"\x09" + bytes(8) + b"\x10" + bytes(5) + b"\x2a" + _varint(len(summary))
    events = np.tile(np.frombuffer(head + summary, np.uint8), (rows, 1))
    events[:, 1:9] = wall_times.astype("<f8")[:, None].view(np.uint8)
    digits = steps.astype(np.int64)[:, None] >> np.arange(0, 35, 7)
    events[:, 10:15] = (digits & 0x7F) | np.array([0x80, 0x80, 0x80, 0x80, 0])
    for column, place in zip(values.T, places, strict=True):
        start = len(head) + place
        events[:, start : start + 4] = column.astype("<f4")[:, None].view(np.uint8)
    return events


def _varint(value: int) -> bytes:
    digits = []
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _framed(events: np.ndarray) -> bytes:
    """Records of serialised events of one size, `[rows, size]`."""
    rows, size = events.shape
    head = np.frombuffer(_head(size), np.uint8)
    tails = _checksums(events).astype("<u4")[:, None].view(np.uint8)
    return np.concatenate([np.tile(head, (rows, 1)), events, tails], axis=1).tobytes()


def _head(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + _checksums(np.frombuffer(length, np.uint8)[None]).astype("<u4").tobytes()


def _checksums(rows: np.ndarray) -> np.ndarray:
    """Masked CRC-32C of every row of uint8 `[rows, size]`."""
    if len(rows) < _FEW:
        crc = np.array([pb.crc32c(row.tobytes()) for row in rows], np.uint32)
    else:
        table = np.array(pb.CRC_TABLE, np.uint32)
        crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
        for column in np.ascontiguousarray(rows.T):
            crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
        crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def _step(record: bytes) -> int:
    return pb.Event.FromString(record[12:-4]).step


def _records(data: bytes) -> tuple[list[tuple[int, int]], bool]:
    """Where each sound record begins and ends; and whether there is damage besides an unfinished
    end. What follows a damaged length cannot be told apart."""
    heads: dict[int, bytes] = {}
    by_size: dict[int, list[int]] = defaultdict(list)
    records: list[tuple[int, int]] = []
    start, damaged = 0, False
    while start + 16 <= len(data):
        (size,) = struct.unpack_from("<Q", data, start)
        end = start + 16 + size
        if data[start : start + 12] != heads.setdefault(size, _head(size)):
            damaged = any(data[start:])  # zeros are left by a machine that lost its power
            break
        if end > len(data):
            break
        by_size[size].append(start)
        records.append((start, end))
        start = end
    array = np.frombuffer(data, np.uint8)
    bad: set[int] = set()
    for size, starts in by_size.items():
        offsets = np.array(starts)
        events = array[offsets[:, None] + np.arange(12, 12 + size)]
        tails = array[offsets[:, None] + np.arange(12 + size, 16 + size)]
        bad.update(offsets[_checksums(events) != tails.view("<u4")[:, 0]].tolist())
    sound = [(a, b) for a, b in records if a not in bad]
    last = sound[-1][0] if sound else 0
    return sound, damaged or any(a < last for a in bad)
