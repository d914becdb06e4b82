"""A callback that shows progress in the terminal."""

import sys
import time
from collections import deque
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from eqxmeta._arguments import check_number
from eqxmeta._bar import open_bar
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.published import Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run
from eqxmeta._errors import tell

# More of what callbacks log would leave no room for the bar.
_SHOWN = 2

# Chunks over which the speed is averaged: about ten seconds of them, if the trainer sets the pace.
_CHUNKS = 20


class ProgressBar(Callback):
    """Shows how far the run is, how fast it goes, and how well: in a terminal (on stderr), and in a
    notebook as a widget.

         30%|###       | 6000/20000 [00:09, 00:12 left, 1.17k steps/s, 29.3k tasks/s, loss 0.712]

    The speed is that of the last chunks. The time that is left counts in what callbacks take, such
    as evaluations, once there has been one; compiling is left out. Of what callbacks log the first
    two names are shown with their newest value, a curve over inner steps by its last. What takes
    longer than a second, such as compiling, is named, with a clock.

    - `log_every_seconds`: without a terminal, in the log of a job for example, there is a line
      every so many seconds, and one at the end of a run that had any; `None`: no line.
    - `disable`: `None` shows the bar in a terminal and in a notebook, else the lines; `False` shows
      the bar anyway, `True` shows nothing.
    """

    logs = ()

    def __init__(
        self,
        *,
        log_every_seconds: int | float | None = 60.0,
        disable: bool | None = None,
        name: str | None = None,
    ):
        if log_every_seconds is not None:
            argument = "ProgressBar(log_every_seconds=...)"
            log_every_seconds = check_number(log_every_seconds, argument, positive=True)
        self.log_every_seconds = log_every_seconds
        self.disable = disable
        self.name = name
        self._bar: tqdm | None = None

    def on_fit_start(self, run: Run) -> None:
        self._close()
        self._talks = False  # whether a line has been said
        if jax.process_index() > 0:  # the first shows it
            return
        self._loss: float | None = None
        self._published: dict[str, float] = {}
        self._ends: deque[tuple[int, float]] = deque()  # of chunks: step, time
        self._meta_batch_size: int | None = run.config.get("meta_batch_size")
        self._bar = open_bar(
            self.disable,
            total=run.steps,
            initial=run.start,
            unit="step",
            miniters=1,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._text = ""
        self._began = self._said = time.perf_counter()
        if not self._bar.disable:
            run.show = self._show

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        if self._bar is None or self.disable:
            return
        if "loss" in metrics:
            self._loss = float(metrics["loss"][-1])
        step, now = int(metrics["step"][-1]), time.perf_counter()
        self._ends.append((step, now))
        # So many that each callback had its turn among them.
        while len(self._ends) > _CHUNKS and self._ends[1][0] <= step - (run.cadence or 0):
            self._ends.popleft()
        self._text = self._postfix(run.steps - step)
        if not self._bar.disable:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self.log_every_seconds is not None and now - self._said >= self.log_every_seconds:
            self._say(run)

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        if self._bar is None or self.disable:
            return
        for name, value in scalars.items():
            if not isinstance(value, Image | Histogram):
                last = value.mean[-1] if isinstance(value, Curve) else value
                self._published[name] = float(last)
        self._text = self._postfix(run.steps - run.step)
        if not self._bar.disable:
            self._bar.set_postfix_str(self._text)

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._close()

    def on_fit_end(self, run: Run) -> None:
        if self._talks:
            self._say(run)
        self._close()

    def _say(self, run: Run) -> None:
        """A line in the place of the bar."""
        self._said, self._talks = time.perf_counter(), True
        elapsed = tqdm.format_interval(self._said - self._began)
        text = ", ".join(part for part in (elapsed, self._text) if part)
        tell(f"{run.step / run.steps:4.0%} {run.step:,}/{run.steps:,} [{text}]", sys.stderr)

    def _show(self, activity: str | None) -> None:
        with tqdm.get_lock():  # on another thread than all else
            if self._bar is not None:
                self._bar.set_postfix_str(activity or self._text)

    def _postfix(self, steps_left: int) -> str:
        parts = []
        if len(self._ends) > 1:
            (first, begin), (last, end) = self._ends[0], self._ends[-1]
            left = steps_left * max(end - begin, 1e-6) / (last - first)
            first, begin = self._ends[-min(_CHUNKS, len(self._ends))]
            speed = (last - first) / max(end - begin, 1e-6)
            parts.append(f"{tqdm.format_interval(left)} left")
            parts.append(f"{tqdm.format_sizeof(speed)} steps/s")
            if self._meta_batch_size:
                parts.append(f"{tqdm.format_sizeof(speed * self._meta_batch_size)} tasks/s")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3g}")
        parts += [f"{name} {value:.3g}" for name, value in list(self._published.items())[:_SHOWN]]
        return ", ".join(parts)

    def _close(self) -> None:
        # Leaves the bar as it was drawn last, and the cursor at the start of a line.
        with tqdm.get_lock():
            if self._bar is not None:
                self._bar.set_postfix_str(self._text, refresh=False)
                self._bar.close()
                self._bar = None
