"""The base of callbacks that send a run to a place of the user's own."""

import abc
from collections.abc import Mapping

import numpy as np

from eqxmeta._arguments import check_int
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.published import Curve, Histogram, Image, Published
from eqxmeta._callback.run import Run


class Logger(Callback, abc.ABC):
    """Base of a callback that sends the run to a service: fill in `write`.

        class Print(Logger):
            def write(self, step, values):
                print(step, values)

    - `every`: the training metrics of which outer steps are written, multiples of it. What other
      callbacks log is written whenever they do.
    - `name`: tells several of one class apart.

    What a subclass fills in:

    - `write(step, values)`: numbers by name, as floats; NaN among them. They are
      `train/<metric>`, and what callbacks log, such as `eval/accuracy`: of a curve over inner
      steps the last point, and as `<name>/ci95` the half-width of its 95% interval.
    - `write_image(step, name, pixels)`: uint8 `[height, width, 3]`. By default pictures are left
      out; histograms always are.
    - `on_fit_start(run)`, `on_fit_end(run)`, `on_exception(run, error)`: to open and to close.
      `run.config` describes the run, `run.id` is its name, `run.start` the step it goes on from.

    A run that is resumed writes the steps after its checkpoint once more. Raises `TypeError` or
    `ValueError` for an `every` that is not a positive integer.
    """

    writes = True
    logs = ()

    def __init__(self, *, every: int = 10, name: str | None = None):
        self._thinning = check_int(every, "Logger(every=...)", minimum=1, what="outer steps")
        self.name = name

    @abc.abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """By default pictures are left out."""

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        columns = {f"train/{name}": rows for name, rows in metrics.items() if name != "step"}
        for row, step in enumerate(metrics["step"].tolist()):
            if step % self._thinning == 0:
                self.write(step, {name: float(rows[row]) for name, rows in columns.items()})

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        values: dict[str, float] = {}
        for name, value in scalars.items():
            if isinstance(value, Curve):
                values[name] = float(value.mean[-1])
                values[f"{name}/ci95"] = float(value.ci95[-1])
            elif isinstance(value, Image):
                self.write_image(run.step, name, value.pixels)
            elif not isinstance(value, Histogram):
                values[name] = float(value)
        if values:
            self.write(run.step, values)
