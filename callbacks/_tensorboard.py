"""A callback that logs to TensorBoard."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_argument, check_folder, check_int, check_path, place_of
from eqxmeta._callback import summaries
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.log_owner import LOG, LOG_TYPES, is_foreign
from eqxmeta._callback.published import AT_END, Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run
from eqxmeta._callback.summaries import DETAIL, DETAILS
from eqxmeta._errors import explain, warn
from eqxmeta._files.event_file import EventFile, event_files, tell_missing, unreadable
from eqxmeta._files.lock import locked

# The sub-run of the newest curves.
INNER = "inner_steps"


class TensorBoard(Callback):
    """Writes the run to `logdir` for TensorBoard, what matters most where it is seen first.

    - `eval/accuracy`, `eval/loss`, ...: what callbacks log, under the names that they give. Of a
      curve over inner steps this is the last point: the adapted model.
    - `train/<metric>`: every metric of the outer step, at steps that are multiples of `every`, the
      learning rate where `optax.inject_hyperparams` keeps it among them; and
      `train/examples_per_second`, support and query, from one chunk's end to the next one's.
      `every` thins what is written; it does not make the compiled loop stop.
    - `within_task/...`, behind these: a curve's points (`within_task/eval/loss/after_0`, ...), the
      ends of the 95% interval of its last (`within_task/eval/loss/ci95_low`, `ci95_high`), and the
      training metrics before adaptation and of each inner step.
    - The tab "Custom scalars": each curve's last point with its interval as a band; the newest
      curve by inner step, with its band (the sub-run `inner_steps`); and all points. The bands are
      not smoothed.
    - The sub-run `at_end`: what was logged only because the run ended there. A run that goes on
      lets TensorBoard forget it.
    - The tab "HParams": `hparams`; without any, what the run is in a few words. The tab "Text": its
      whole configuration.

    NaN is not written. `JSONL` has every step and every number.

    A resumed run adds a file that tells TensorBoard to forget the steps after the checkpoint's, so
    that it shows every step once. If there was no checkpoint yet, or the files are of another run
    than that which goes on, it is told to forget them all. No file that is there is changed. Files
    that are gone, or shorter than they were, are warned of with their steps. After `kill -9`
    everything up to the last chunk is there.

    Raises `FileExistsError` at the start of a run that does not resume, if `logdir` already holds
    event files (with `overwrite=True` they stay, TensorBoard forgets them, and a warning says so),
    and `CheckpointInUse` while another run writes to it.
    """

    writes = True
    logs = ()
    state_types = LOG_TYPES

    def __init__(
        self,
        logdir: str | Path,
        *,
        every: int = 10,
        hparams: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        name: str | None = None,
    ):
        self._thinning = check_int(every, "TensorBoard(every=...)", minimum=1, what="outer steps")
        hparams = {} if hparams is None else hparams
        sound = isinstance(hparams, Mapping) and all(isinstance(key, str) for key in hparams)
        expected = "a mapping from names to values"
        check_argument(sound, hparams, "TensorBoard(hparams=...)", expected, TypeError)
        self.logdir = self._place = check_path(logdir, "TensorBoard(logdir=...)")
        self.hparams = dict(hparams)
        self.overwrite = overwrite
        self.name = name
        self._file: EventFile | None = None
        self._inner: EventFile | None = None
        self._ending: EventFile | None = None
        self._restored: dict[str, Any] | None = None
        self._check_lock: Callable[[], None] = lambda: None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._place = place_of(self.logdir, "TensorBoard(logdir=...)")
        check_folder(self._place, "TensorBoard(logdir=...)")
        with locked(self._place, ".tensorboard.lock") as self._check_lock:
            yield

    def refuse(self, run: Run) -> None:
        check_folder(self._place, "TensorBoard(logdir=...)")
        if not run.resuming and not self.overwrite and event_files(self._place):
            message = "`TensorBoard(logdir=...)` already holds a run."
            expected = "a folder without event files. Pass resume='auto' to continue the run, "
            expected += "choose another folder, or `overwrite=True`: TensorBoard then forgets it"
            raise FileExistsError(explain(message, f"'{self._place}'", expected))

    def on_fit_start(self, run: Run) -> None:
        self.refuse(run)
        self._check_lock()
        restored, self._restored = self._restored, None
        earlier = event_files(self._place)
        fate = "Its files stay, but TensorBoard does not show them any more"
        if earlier and not run.resuming:
            warn(f"The run begins anew: TensorBoard shows no more of what was in {self._place}.")
        goes_on = bool(earlier and run.start) and not is_foreign(
            run, restored, earlier, log=self._place, fate=fate
        )
        for name in earlier:
            if (reason := unreadable(self._place / name)) is not None:
                message = f"TensorBoard cannot show {self._place} while {name} is in it."
                warn(explain(message, reason, "an event file. It stays as it is: move it away"))
        # Of this run: by name the step with which each began, and how many bytes it had.
        self._told = dict((restored or {}).get("files", {}))
        tell_missing(self._place, self._told, run.start)
        self._file = EventFile(self._place)
        self._began = run.start + 1
        self._inner = self._ending = None
        self._ended_before = bool(event_files(self._place / AT_END))
        self._inner_step: int | None = None  # the outer step of the curves in `_inner`
        self._curves: set[str] = set()
        self._last_time, self._timed = time.time(), False
        if earlier:
            self._file.forget(run.start + 1 if goes_on else 0)
        if not goes_on:
            self._file.add(0, summaries.hparams(self.hparams, run.config))
            self._file.add(0, summaries.configuration({**self.hparams, **run.config}))
        self._file.flush()

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        assert self._file is not None
        self._check_lock()
        if self._ended_before:  # and goes on
            self._ending, self._ended_before = EventFile(self._place / AT_END), False
            self._ending.forget(0)
            self._ending.flush()
        # A chunk arrives at once; its steps were taken since the one before.
        now, steps_taken = time.time(), len(metrics["step"])
        times = np.linspace(self._last_time, now, steps_taken + 1)[1:]
        if run.examples and self._timed:  # before the first chunk there was compiling
            speed = run.examples * steps_taken / max(now - self._last_time, 1e-6)
            metrics = {**metrics, "examples_per_second": np.full(steps_taken, speed)}
        self._last_time, self._timed = now, True
        keep = metrics["step"] % self._thinning == 0
        columns = {
            f"{DETAILS}/train/{name}" if DETAIL.search(name) else f"train/{name}": values[keep]
            for name, values in metrics.items()
            if name != "step"
        }
        rows = zip(*(values.astype(float).tolist() for values in columns.values()), strict=True)
        steps = metrics["step"][keep].tolist()
        for step, wall_time, row in zip(steps, times[keep].tolist(), rows, strict=False):
            self._file.add(step, summaries.scalars(zip(columns, row, strict=True)), wall_time)
        self._file.flush()

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        assert self._file is not None
        self._check_lock()
        file = self._file
        if run.ended:
            file = self._ending = self._ending or EventFile(self._place / AT_END)
        values, numbers, curves = [], {}, {}
        for name, value in scalars.items():
            if isinstance(value, Curve):
                curves[name] = value
                numbers |= summaries.points(name, value)
            elif isinstance(value, Image):
                values += summaries.image(name, value.pixels)
            elif isinstance(value, Histogram):
                values += summaries.histogram(name, value.values)
            else:
                numbers[name] = float(value)
        file.add(run.step, [*summaries.scalars(numbers.items()), *values])
        if not curves.keys() <= self._curves:
            self._curves |= curves.keys()
            self._file.add(0, summaries.layout(sorted(self._curves)))
            self._file.flush()
        file.flush()
        if curves:
            self._add_inner(run.step, curves)

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._flush()
        self.sync_files()

    def on_fit_end(self, run: Run) -> None:
        self._flush()
        self.sync_files()

    def state_dict(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        self._flush()
        name = self._file.path.name
        self._told[name] = {"begin": self._began, "bytes": self._file.size}
        return {LOG: name, "files": self._told}

    def sync_files(self) -> None:
        for file in self._files:
            file.sync()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    @property
    def _files(self) -> list[EventFile]:
        return [file for file in (self._file, self._inner, self._ending) if file is not None]

    def _flush(self) -> None:
        self._check_lock()
        for file in self._files:
            file.flush()

    def _add_inner(self, step: int, curves: Mapping[str, Curve]) -> None:
        """The curves themselves, in a sub-run in which TensorBoard forgets those before. (One
        sub-run an evaluation is no way: beyond forty runs TensorBoard deselects them all.)"""
        if self._inner is None:
            self._inner = EventFile(self._place / INNER)
        if self._inner_step != step:
            self._inner.forget(0)
            self._inner_step = step
        for i in range(max(len(curve.mean) for curve in curves.values())):
            numbers = {}
            for name, curve in curves.items():
                if i < len(curve.mean):
                    mean, half = float(curve.mean[i]), float(curve.ci95[i])
                    ends = mean, mean - half, mean + half
                    numbers |= zip(summaries.inner_band(name), ends, strict=True)
            self._inner.add(i, summaries.scalars(numbers.items()))
        self._inner.flush()
