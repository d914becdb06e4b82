"""A log of JSON objects, one a line and each of a step, as a run finds it."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from .._arguments import check_json
from .._errors import explain, warn
from .atomic import replacing
from .disk import is_absence, is_damage
from .paths import set_aside, stale_name


def first_line(path: Path) -> str | None:
    """A digest of the first line: by which a log is known. `None` if it has none that is sound."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except OSError as error:
        if is_absence(error) or is_damage(error):
            return None
        raise
    return None if _parse(line) is None else hashlib.sha256(line).hexdigest()[:16]


def read_rows(path: Path, last: int) -> list[tuple[bytes, dict[str, Any]]]:
    """As `_read`; what the disk cannot give back is set aside, and the log begins anew."""
    try:
        return _read(path, last)
    except OSError as error:
        if not is_damage(error):
            raise
        stale = set_aside(path)
        expected = f"records that can be read. It is kept as {stale}; this one begins anew"
        warn(explain(f"The log {path} is damaged.", error, expected))
        return []


def _read(path: Path, last: int) -> list[tuple[bytes, dict[str, Any]]]:
    """Leave `path` with its sound lines up to step `last`, which are returned, also as rows: one a
    step, the first, in order. Warns of damage that is no torn end, and then leaves a copy."""
    data = path.read_bytes() if path.exists() else b""
    parsed = [(line, _parse(line)) for line in io.BytesIO(data)]
    found = [(line, row) for line, row in parsed if row is not None and row["step"] <= last]
    # Of two the first: by the first line the log is known.
    rows = [
        each for _, each in sorted({row["step"]: (line, row) for line, row in found[::-1]}.items())
    ]
    # A line without an end is the last, and no more than torn off.
    if rows != found or any(row is None and line.endswith(b"\n") for line, row in parsed):
        stale = stale_name(path)
        stale.touch(0o600)
        shutil.copy(path, stale)  # its mode too
        received = "lines that are not as they were written, and not only torn off at its end"
        expected = f"a row a step, in order. They stay; all of it as it was is in {stale}"
        warn(explain(f"The log {path} is damaged.", received, expected))
    kept = b"".join(line for line, _ in rows)
    if kept != data:
        with replacing(path) as file:
            file.write(kept)
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line.decode())  # of bytes it would guess the encoding
        check_json(row, "row", 0)  # so deep that it can be written again
    except (ValueError, TypeError, RecursionError):
        return None
    sound = isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0
    return row if sound else None
