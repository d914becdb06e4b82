"""A callback that logs to TensorBoard."""

import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_folder, check_int, check_path
from eqxmeta._callback.callback import LOG, Callback, is_foreign
from eqxmeta._callback.published import Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run
from eqxmeta._errors import explain
from eqxmeta._files.atomic import remove_leftovers
from eqxmeta._files.lock import locked
from eqxmeta._files.paths import set_aside, warn_foreign, warn_short
from eqxmeta._tensorboard import protobuf as pb
from eqxmeta._tensorboard.event_file import (
    EventFile,
    cut,
    event_files,
    first_told,
    hidden,
    own_event_files,
)
from eqxmeta._tensorboard.summaries import (
    histogram_summary,
    hparams_summary,
    image_summary,
    layout_summary,
    scalars_summary,
    tags_of,
)

# The sub-run of the newest curve.
_INNER = "inner_steps"


class TensorBoard(Callback):
    """Writes the run to `logdir` for TensorBoard.

    - `train/<metric>`: every metric of the outer step, at steps that are multiples of `every`.
      `every` thins what is written; it does not make the compiled loop stop.
    - What callbacks publish: numbers, images, histograms, and curves over inner steps. A curve
      `eval/loss` becomes `eval/loss/after_0`, `after_1`, ... against outer steps, with the ends of
      its 95% interval under `ci95/...` (drawn as a band in the tab "Custom scalars"), and the
      newest curve is the sub-run `inner_steps`, whose x axis is the inner step.
    - `hparams` and the run's own configuration, in the tab "HParams".

    A resumed run continues the old one: what was written after the checkpoint's step is removed,
    so that every step is there once. If there was no checkpoint yet, or the files are of another
    run than that which goes on, they are renamed to `*.stale`. Event files of other writers are
    left as they are. After `kill -9` everything up to the last chunk is there.

    Raises `FileExistsError` at the start of a run that does not resume, if `logdir` already holds
    a run, and `CheckpointInUse` while another run writes to it.
    """

    writes = True
    publishes = ()

    def __init__(
        self,
        logdir: str | Path,
        *,
        every: int = 1,
        hparams: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
        every = check_int(every, "TensorBoard(every=...)", minimum=1, what="outer steps")
        hparams = {} if hparams is None else hparams
        if not isinstance(hparams, Mapping) or not all(isinstance(key, str) for key in hparams):
            raise TypeError(
                explain(
                    "`TensorBoard(hparams=...)` is not a mapping from names.",
                    repr(hparams),
                    "a mapping from names to values",
                )
            )
        self.logdir = check_path(logdir, "TensorBoard(logdir=...)")
        self.hparams = dict(hparams)
        self.name = name
        self._thinning = every
        self._file: EventFile | None = None
        self._restored: dict[str, Any] | None = None

    def exclusive(self) -> AbstractContextManager[None]:
        check_folder(self.logdir, "TensorBoard(logdir=...)")
        return locked(self.logdir, ".tensorboard.lock")

    def refuse(self, run: Run) -> None:
        check_folder(self.logdir, "TensorBoard(logdir=...)")
        if not run.resuming and event_files(self.logdir):
            raise FileExistsError(
                explain(
                    "`TensorBoard(logdir=...)` already holds a run.",
                    f"'{self.logdir}'",
                    "a folder without event files. Pass resume='auto' to continue the run, "
                    "or choose another folder",
                )
            )

    def on_fit_start(self, run: Run) -> None:
        self.refuse(run)
        restored, self._restored = self._restored, None
        if run.resuming:
            remove_leftovers(self.logdir, "events.out.*")
            newest = 0
            if run.start > 0 and not self._is_foreign(restored, run):
                newest = _rewind(self.logdir, run.start)
            else:  # of a start nothing can be continued, and no checkpoint says whose it is
                _set_aside(self.logdir)
            if 0 < newest < run.start - run.start % self._thinning:
                warn_short(self.logdir, newest, run.start)
        begun = bool(own_event_files(self.logdir))
        self._file = EventFile(self.logdir)
        self._curves: dict[str, int] = {}
        self._inner: tuple[int, EventFile] | None = None
        self._last_time = time.time()
        if run.resuming:
            # A TensorBoard that is running has the removed steps in memory: this makes it forget.
            start = pb.SessionLog(status=pb.SessionLog.START)
            self._file.add(
                pb.Event(step=run.start + 1, wall_time=self._last_time, session_log=start)
            )
        if not begun:
            config = {k: v for k, v in run.config.items() if k != "fingerprint"}
            self._add(0, hparams_summary({**config, **self.hparams}))
        self._file.flush()

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        assert self._file is not None
        names = [name for name in metrics if name != "step"]
        steps = metrics["step"]
        # A chunk arrives at once; its steps were taken since the one before.
        now = time.time()
        times = np.linspace(self._last_time, now, len(steps) + 1)[1:]
        self._last_time = now
        keep = steps % self._thinning == 0
        if names and keep.any():
            values = np.stack([metrics[name][keep].astype(np.float32) for name in names], axis=1)
            tags = [f"train/{name}" for name in names]
            self._file.add_scalars(tags, steps[keep], times[keep], values)
        self._file.flush()

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        assert self._file is not None
        numbers: dict[str, float] = {}
        for name, value in scalars.items():
            if isinstance(value, Curve):
                numbers |= self._curve(run.step, name, value)
            elif isinstance(value, Image):
                self._add(run.step, image_summary(name, value.pixels))
            elif isinstance(value, Histogram):
                finite = np.asarray(value.values, np.float64).ravel()
                finite = finite[np.isfinite(finite)]  # a mask's -inf has no place on an axis
                if finite.size:
                    self._add(run.step, histogram_summary(name, finite))
            else:
                numbers[name] = float(value)
        self._add(run.step, scalars_summary(numbers))
        curves = {name: len(v.mean) for name, v in scalars.items() if isinstance(v, Curve)}
        if not curves.items() <= self._curves.items():
            self._curves |= curves
            self._add(0, layout_summary(self._curves))
        self._file.flush()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._flush()

    def on_fit_end(self, run: Run) -> None:
        self._flush()

    def state_dict(self) -> dict[str, Any]:
        # What a checkpoint's step has told must be in the file when the run resumes from it.
        self._flush()
        first = first_told(self.logdir)
        return {} if first is None else {LOG: first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def _is_foreign(self, restored: dict[str, Any] | None, run: Run) -> bool:
        found = first_told(self.logdir)
        if not own_event_files(self.logdir) or not is_foreign(run, restored, found):
            return False
        warn_foreign(self.logdir, run.start)
        return True

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush(sync=True)
        if self._inner is not None:
            self._inner[1].flush(sync=True)

    def _add(self, step: int, content: Any) -> None:
        assert self._file is not None
        self._file.add(pb.Event(step=step, wall_time=time.time(), summary=content))

    def _curve(self, step: int, name: str, curve: Curve) -> dict[str, float]:
        """The curve's values by tag; and the curve itself, in a sub-run of its own."""
        low, high = curve.mean - curve.ci95, curve.mean + curve.ci95
        if self._inner is None or self._inner[0] != step:
            # One sub-run, of the newest evaluation: TensorBoard deselects everything once there
            # are more than forty runs. A new file, that first makes it forget the one before.
            folder = self.logdir / _INNER
            old = own_event_files(folder)
            # The steps in it are inner ones: its name tells `_rewind` of which outer step they are.
            self._inner = (step, EventFile(folder, suffix=f".step-{step}"))
            forget = pb.SessionLog(status=pb.SessionLog.START)
            self._inner[1].add(pb.Event(step=0, wall_time=time.time(), session_log=forget))
            self._inner[1].flush(sync=True)  # before what it takes the place of is gone
            for path in old:
                path.unlink()
        file = self._inner[1]
        tags = [f"adaptation/{name}", f"adaptation/{name}_low", f"adaptation/{name}_high"]
        length = len(curve.mean)
        times = np.full(length, time.time())
        file.add_scalars(tags, np.arange(length), times, np.stack([curve.mean, low, high], axis=1))
        file.flush()
        numbers = {}
        for i in range(length):
            after, lower, upper = tags_of(name, i)
            numbers |= {after: curve.mean[i], lower: low[i], upper: high[i]}
        return numbers


def _set_aside(logdir: Path) -> None:
    for path in own_event_files(logdir) + own_event_files(logdir / _INNER):
        set_aside(path, hidden(path.name))


def _rewind(logdir: Path, start: int) -> int:
    """Remove what an earlier attempt wrote after the step `start` from which a run goes on. Returns
    the newest step that is left, or 0."""
    newest = max((cut(path, start) for path in own_event_files(logdir)), default=0)
    for path in own_event_files(logdir / _INNER):
        step = re.search(r"\.step-(\d+)$", path.name)
        if step is not None and int(step[1]) > start:
            path.unlink()
    return newest
