"""A callback that logs one line of JSON per outer step."""

import glob
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_file, check_int, check_path, place_of
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.log_owner import LOG, LOG_TYPES, is_foreign
from eqxmeta._callback.published import AT_END, Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run
from eqxmeta._errors import explain, warn
from eqxmeta._files.atomic import remove_leftovers
from eqxmeta._files.lock import file_locked
from eqxmeta._files.paths import OwnFile, make_folder, set_aside, sync_folder
from eqxmeta._files.rows import first_line, read_rows


class JSONL(Callback):
    """Writes the run to `path`, one JSON object a line: the record to compute with afterwards.

        {"step": 1000, "loss": 0.71, "eval/loss": {"mean": [4.2, 0.7], "ci95": [0.3, 0.1]}}

    One line for each outer step that is a multiple of `every` (`every` thins what is written; it
    does not make the compiled loop stop) and for each step at which something was logged, in
    the order of the steps, never two for the same. Curves over inner steps become an object,
    images are left out. What was logged only because the run ended there is named in the list
    `"at_end"` of the last line, from which a run that goes on removes it. Numbers read back as the
    numbers that they were; what JSON has no number for is one of the strings "NaN", "Infinity",
    "-Infinity", which `float` understands.

    A resumed run continues the file: lines of steps after the checkpoint's, and a torn last line,
    are removed; where other lines are no rows, or of a step that has one, a copy of it all is kept.
    Rows that it lacks are told by their steps. If there was no checkpoint yet, or the file is of
    another run than that which goes on, it is renamed to `*.stale`. After `kill -9` all steps
    before the last chunk's last one are there.

    Raises `FileExistsError` at the start of a run that does not resume, if `path` is not empty
    (with `overwrite=True` the file is renamed to `*.stale`, and a warning says so), and
    `CheckpointInUse` while another run writes to it.
    """

    writes = True
    logs = ()
    state_types = LOG_TYPES

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        overwrite: bool = False,
        name: str | None = None,
    ):
        self.path = self._place = check_path(path, "JSONL(path=...)")
        self.overwrite = overwrite
        self.name = name
        self._thinning = check_int(every, "JSONL(every=...)", minimum=1, what="outer steps")
        self._held: dict[str, Any] | None = None
        self._restored: dict[str, Any] | None = None
        self._check_lock: Callable[[], None] = lambda: None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._place = place_of(self.path, "JSONL(path=...)")
        check_file(self._place, "JSONL(path=...)")
        with file_locked(self._place) as self._check_lock:
            yield

    def refuse(self, run: Run) -> None:
        check_file(self._place, "JSONL(path=...)")
        if not run.resuming and not self.overwrite and self._occupied():
            message = "`JSONL(path=...)` already holds a run."
            expected = "a file that does not exist yet. Pass resume='auto' to continue the run, "
            expected += "choose another path, or `overwrite=True`, which renames the file"
            raise FileExistsError(explain(message, f"'{self._place}'", expected))

    def on_fit_start(self, run: Run) -> None:
        self.refuse(run)
        self._check_lock()
        restored, self._restored = self._restored, None
        # From step 0 nothing of that attempt can be continued: no checkpoint says whose it is.
        if self._occupied() and (run.start == 0 or self._is_foreign(run, restored)):
            stale = set_aside(self._place)
            if not run.resuming:
                warn(f"The run begins anew: the log {self._place} is now {stale.name}.")
        rows = read_rows(self._place, run.start) if run.resuming else []
        self._expect(run, restored, [row["step"] for _, row in rows])
        make_folder(self._place.parent)
        remove_leftovers(self._place.parent, glob.escape(self._place.name))
        self._place.touch()
        sync_folder(self._place.parent)  # rows that are synced are not lost with the file's entry
        self._file = OwnFile(self._place)
        # The newest row is held back, because more may be logged at its step. It may be in
        # the file already; its line then begins at `_end`, and is written again if it changes.
        # What the file holds from `_end` on is `_last`.
        self._last, self._held = rows[-1] if rows else (b"", None)
        self._end = sum(len(line) for line, _ in rows) - len(self._last)
        self._pending: list[bytes] = []  # complete lines that are not in the file
        self._ended = False

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        keep = metrics["step"] % self._thinning == 0
        names = ["step", *(name for name in metrics if name != "step")]
        columns = (metrics[name][keep].tolist() for name in names)
        self._append(dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        values = {k: _plain(v) for k, v in scalars.items() if not isinstance(v, Image | Histogram)}
        if values:
            mark = {AT_END: [*self._marked(run.step), *values]} if run.ended else {}
            self._append([{"step": run.step, **values, **mark}])
        if self._ended:
            self._sync()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._sync()

    def on_fit_end(self, run: Run) -> None:
        # Callbacks whose turn comes later may still log something at this step.
        self._ended = True
        self._sync()

    def state_dict(self) -> dict[str, Any]:
        # The checkpoint's step must have its line, with everything that was logged at it.
        self._flush()
        state = {"rows": self._rows, "since": self._since, "every": self._thinning}
        # Which log it is. Not while more may be logged at the step of its first line.
        return state | ({LOG: first_line(self._place)} if self._end > 0 else {})

    def sync_files(self) -> None:
        self._file.sync()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def _occupied(self) -> bool:
        return self._place.exists() and self._place.stat().st_size > 0

    def _is_foreign(self, run: Run, restored: dict[str, Any] | None) -> bool:
        found = [first] if (first := first_line(self._place)) else []
        return is_foreign(run, restored, found, log=self._place, fate="It is kept as *.stale")

    def _expect(self, run: Run, state: Mapping[str, Any] | None, steps: list[int]) -> None:
        """Tell which rows up to the checkpoint's step the log lacks, of which it has `steps`."""
        end, known = run.start + 1, {"since": run.start + 1} if state is None else state
        every = min(max(known.get("every", self._thinning), 1), end)
        since = min(max(known.get("since", steps[0] if steps else end), 1), end)
        expected = np.arange(min(-(-since // every) * every, end), end, every)
        missing = np.setdiff1d(expected, steps)
        count = max(len(missing), known.get("rows", 0) - len(steps))
        if count > 0:
            named = f": at step {_spans(missing, every)}" if len(missing) else ""
            received = f"{len(steps):,} rows, {count:,} less than the run wrote{named}"
            wanted = f"all up to step {run.start}, where the run goes on. It goes on without them"
            warn(explain(f"The log {self._place} lacks rows.", received, wanted))
        self._since = since if every == self._thinning else end
        self._rows = len(steps)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if self._held is not None and self._held["step"] == row["step"]:
                self._held |= row
                continue
            if self._held is not None and (held := _without_marked(self._held)):
                self._pending.append(_line(held))
            elif self._held is not None:
                self._rows -= 1
            self._held = row
            self._rows += 1
        if self._pending:
            lines = b"".join(self._pending)
            self._write(lines)
            self._end += len(lines)
            self._last, self._pending = b"", []

    def _marked(self, step: int) -> list[str]:
        """The names that are marked at `step` so far."""
        held = self._held
        return held.get(AT_END, []) if held is not None and held["step"] == step else []

    def _flush(self) -> None:
        if self._held is not None:
            self._write(b"".join([*self._pending, _line(self._held)]))

    def _sync(self) -> None:
        self._flush()
        self.sync_files()

    def _write(self, data: bytes) -> None:
        """Let the file go on with `data` from `_end`. If that fails it keeps what it had there:
        a checkpoint may have been written since."""
        self._check_lock()
        same = len(self._last) if data.startswith(self._last) else 0
        try:
            self._file.write_at(self._end + same, data[same:])
        except OSError:
            if not same:
                last, self._last = self._last, b""
                with suppress(OSError):
                    self._file.write_at(self._end, last)
                    self._last = last
            raise
        self._last = data


def _without_marked(row: dict[str, Any]) -> dict[str, Any] | None:
    """What a run that went on has at this step; `None` if nothing."""
    if AT_END not in row:
        return row
    rest = {name: x for name, x in row.items() if name not in (AT_END, *row[AT_END])}
    return rest if len(rest) > 1 else None


def _spans(steps: np.ndarray, every: int) -> str:
    parts = np.split(steps, np.flatnonzero(np.diff(steps) != every) + 1)
    spans = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(spans[:20]) + (", ..." if len(spans) > 20 else "")


_encode = json.JSONEncoder(allow_nan=False).encode


def _line(row: dict[str, Any]) -> bytes:
    try:
        text = _encode(row)
    except ValueError:  # rare, so that it costs nothing to look for it
        text = _encode(_nameable(row))
    return text.encode() + b"\n"


def _nameable(value: Any) -> Any:
    """`value` with names for the floats that JSON does not have."""
    if isinstance(value, dict):
        return {k: _nameable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nameable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _plain(value: Published) -> Any:
    if isinstance(value, Curve):
        return {"mean": np.asarray(value.mean).tolist(), "ci95": np.asarray(value.ci95).tolist()}
    return float(value)  # pyright: ignore[reportArgumentType]
