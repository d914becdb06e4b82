"""A callback that logs to TensorBoard."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_argument, check_folder, check_int, check_path, place_of
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.log_owner import LOG, LOG_TYPES, is_foreign
from eqxmeta._callback.published import AT_END, Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run
from eqxmeta._errors import explain, warn
from eqxmeta._files.event_file import EventFile, event_files, proto, unreadable
from eqxmeta._files.lock import locked

# tensorboardX is imported when it is used: it imports torch wherever that is installed.

# TensorBoard groups tags by what comes before the first slash, in alphabetical order. What is in
# this group comes after `eval` and `train`.
_DETAILS = "within_task"
# The sub-run of the newest curves.
_INNER = "inner_steps"
# A metric before adaptation, or of one inner step.
_DETAIL = re.compile(r"_before$|/\d+$")
# Of a histogram; TensorBoard draws about as many.
_BINS = 30


class TensorBoard(Callback):
    """Writes the run to `logdir` for TensorBoard, what matters most where it is seen first.

    - `eval/accuracy`, `eval/loss`, ...: what callbacks log, under the names that they give. Of a
      curve over inner steps this is the last point: the adapted model.
    - `train/<metric>`: every metric of the outer step, at steps that are multiples of `every`.
      `every` thins what is written; it does not make the compiled loop stop.
    - `within_task/...`, behind these: a curve's points (`within_task/eval/loss/after_0`, ...), the
      ends of the 95% interval of its last (`within_task/eval/loss/ci95_low`, `ci95_high`), and the
      training metrics before adaptation and of each inner step.
    - The tab "Custom scalars": each curve's last point with its interval as a band, and all points.
      The newest curves are the sub-run `inner_steps`, whose x axis is the inner step.
    - The sub-run `at_end`: what was logged only because the run ended there. A run that goes on
      lets TensorBoard forget it.
    - The tab "HParams": `hparams`, and behind them, led by "~", the run's own configuration.

    NaN is not written. `JSONL` has every step and every number.

    A resumed run adds a file that tells TensorBoard to forget the steps after the checkpoint's, so
    that it shows every step once. If there was no checkpoint yet, or the files are of another run
    than that which goes on, it is told to forget them all. No file that is there is changed. After
    `kill -9` everything up to the last chunk is there.

    Raises `FileExistsError` at the start of a run that does not resume, if `logdir` already holds
    event files, and `CheckpointInUse` while another run writes to it.
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
        name: str | None = None,
    ):
        self._thinning = check_int(every, "TensorBoard(every=...)", minimum=1, what="outer steps")
        hparams = {} if hparams is None else hparams
        sound = isinstance(hparams, Mapping) and all(isinstance(key, str) for key in hparams)
        expected = "a mapping from names to values"
        check_argument(sound, hparams, "TensorBoard(hparams=...)", expected, TypeError)
        self.logdir = self._place = check_path(logdir, "TensorBoard(logdir=...)")
        self.hparams = dict(hparams)
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
        if not run.resuming and event_files(self._place):
            message = "`TensorBoard(logdir=...)` already holds a run."
            expected = "a folder without event files. Pass resume='auto' to continue the run, "
            expected += "or choose another folder"
            raise FileExistsError(explain(message, f"'{self._place}'", expected))

    def on_fit_start(self, run: Run) -> None:
        self.refuse(run)
        self._check_lock()
        restored, self._restored = self._restored, None
        earlier = event_files(self._place)
        fate = "Its files stay, but TensorBoard does not show them any more"
        goes_on = bool(earlier and run.start) and not is_foreign(
            run, restored, earlier, log=self._place, fate=fate
        )
        for name in earlier:
            if (reason := unreadable(self._place / name)) is not None:
                message = f"TensorBoard cannot show {self._place} while {name} is in it."
                warn(explain(message, reason, "an event file. It stays as it is: move it away"))
        self._file = EventFile(self._place)
        self._inner = self._ending = None
        self._ended_before = bool(event_files(self._place / AT_END))
        self._inner_step: int | None = None  # the outer step of the curves in `_inner`
        self._curves: set[str] = set()
        self._last_time = time.time()
        if earlier:
            self._file.forget(run.start + 1 if goes_on else 0)
        if not goes_on:
            self._file.add(0, _hparams(self.hparams, run.config))
        self._file.flush()

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        assert self._file is not None
        self._check_lock()
        if self._ended_before:  # and goes on
            self._ending, self._ended_before = EventFile(self._place / AT_END), False
            self._ending.forget(0)
            self._ending.flush()
        # A chunk arrives at once; its steps were taken since the one before.
        now = time.time()
        times = np.linspace(self._last_time, now, len(metrics["step"]) + 1)[1:]
        self._last_time = now
        keep = metrics["step"] % self._thinning == 0
        columns = {
            f"{_DETAILS}/train/{name}" if _DETAIL.search(name) else f"train/{name}": values[keep]
            for name, values in metrics.items()
            if name != "step"
        }
        rows = zip(*(values.astype(float).tolist() for values in columns.values()), strict=True)
        steps = metrics["step"][keep].tolist()
        for step, wall_time, row in zip(steps, times[keep].tolist(), rows, strict=False):
            self._file.add(step, _scalars(zip(columns, row, strict=True)), wall_time)
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
                numbers |= _points(name, value)
            elif isinstance(value, Image):
                values += _image(name, value.pixels)
            elif isinstance(value, Histogram):
                values += _histogram(name, value.values)
            else:
                numbers[name] = float(value)
        file.add(run.step, [*_scalars(numbers.items()), *values])
        if not curves.keys() <= self._curves:
            self._curves |= curves.keys()
            self._file.add(0, _layout(sorted(self._curves)))
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
        self._flush()
        return {} if self._file is None else {LOG: self._file.path.name}

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
            self._inner = EventFile(self._place / _INNER)
        if self._inner_step != step:
            self._inner.forget(0)
            self._inner_step = step
        for i in range(max(len(curve.mean) for curve in curves.values())):
            numbers = {}
            for name, curve in curves.items():
                if i < len(curve.mean):
                    mean, half = float(curve.mean[i]), float(curve.ci95[i])
                    ends = {"": mean, "_low": mean - half, "_high": mean + half}
                    numbers |= {f"{_DETAILS}/{name}{end}": value for end, value in ends.items()}
            self._inner.add(i, _scalars(numbers.items()))
        self._inner.flush()


def _points(name: str, curve: Curve) -> dict[str, float]:
    """What is drawn of a curve against outer steps, by tag. Of the interval only that of the last
    point: then the tags of a metric are the same for any number of inner steps."""
    mean, half = np.asarray(curve.mean, float).tolist(), float(curve.ci95[-1])
    value, low, high = _band(name)
    after = {f"{_DETAILS}/{name}/after_{i}": x for i, x in enumerate(mean)}
    return {value: mean[-1], low: mean[-1] - half, high: mean[-1] + half, **after}


def _band(name: str) -> list[str]:
    return [name, f"{_DETAILS}/{name}/ci95_low", f"{_DETAILS}/{name}/ci95_high"]


def _layout(names: list[str]) -> list[Any]:
    """Of "Custom scalars"; TensorBoard takes the newest of a run, and merges those of several."""
    from tensorboardX.summary import custom_scalars

    points = {name: re.escape(f"{_DETAILS}/{name}/after_") + r"\d+$" for name in names}
    layout = {
        "adapted, with 95% interval": {name: ["Margin", _band(name)] for name in names},
        "after each inner step": {name: ["Multiline", [tag]] for name, tag in points.items()},
    }
    return list(custom_scalars(layout).value)


def _scalars(numbers: Any) -> list[Any]:
    """Of pairs of tag and number, but for NaN."""
    value = proto("summary").Summary.Value
    return [value(tag=tag, simple_value=x) for tag, x in numbers if x == x]


def _hparams(own: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    from tensorboardX.summary import hparams

    # TensorBoard sorts them by name.
    rest = {f"~{name}": value for name, value in config.items() if name != "fingerprint"}
    # Of tensorboardX's three summaries only the values. The declaration of metrics is left out:
    # TensorBoard then offers all scalars, also those that nobody knows yet.
    _, session_start, _ = hparams({k: _plain(v) for k, v in {**own, **rest}.items()}, {})
    return list(session_start.value)


def _plain(value: Any) -> str | bool | int | float:
    """What the HParams tab can show; anything else would be dropped there without a word."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | bool | int | float) else str(value)


def _image(name: str, pixels: np.ndarray) -> list[Any]:
    from tensorboardX.summary import image

    try:
        return list(image(name, np.asarray(pixels), dataformats="HWC").value)
    except ImportError as error:  # no reason to end a run that may have taken hours
        expected = "Pillow, which encodes pictures: pip install pillow"
        warn(explain(f"TensorBoard leaves out the picture {name!r}.", repr(error), expected))
        return []


def _histogram(name: str, values: np.ndarray) -> list[Any]:
    from tensorboardX.summary import histogram

    values = np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]  # a mask's -inf has no place on an axis
    if not values.size:
        return []
    # In halves, for the width of the range may be more than the largest number.
    edges = 2 * np.linspace(values.min() / 2, values.max() / 2, _BINS + 1)
    with np.errstate(over="ignore"):
        return list(histogram(name, values, bins=edges).value)
