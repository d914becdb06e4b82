"""What callbacks that draw a figure have in common."""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import PyTree

from .._arguments import check_file, check_int_or_none, check_path, place_of
from .._files.atomic import replacing
from .._files.lock import file_locked
from .._strategy.strategy import Strategy
from .callback import Callback
from .published import Image
from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(Callback, abc.ABC):
    """Logs what `draw` draws, under `name` or else `tag`, at multiples of `every` and at the end of
    the run (`None`: only then; after SIGTERM not); and writes it into the PNG `path`, if there is
    one, in the place of the one before."""

    tag: str
    grace = None  # it computes, and waits for nobody

    def __init__(self, path: str | Path | None, *, every: int | None, name: str | None):
        caller = type(self).__name__
        self.path = self._place = None if path is None else check_path(path, f"{caller}(path=...)")
        self.writes = path is not None
        what = "outer steps"
        self.every = check_int_or_none(every, f"{caller}(every=...)", minimum=1, what=what)
        self.name = name
        self._drawn: int | None = None  # at which step of this run
        self._check_lock: Callable[[], None] = lambda: None

    @abc.abstractmethod
    def draw(self, run: Run, title: str) -> "Figure":
        """The figure of `run.state`."""

    @abc.abstractmethod
    def check(self, strategy: Strategy, model: PyTree) -> None:
        """Raise if `draw` could not, as far as shapes tell: the first picture may be hours away."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        self._place = place_of(self.path, f"{type(self).__name__}(path=...)")
        check_file(self._place, f"{type(self).__name__}(path=...)")
        with file_locked(self._place) as self._check_lock:
            yield

    def refuse(self, run: Run) -> None:
        if self._place is not None:
            check_file(self._place, f"{type(self).__name__}(path=...)")
        self.check(run.strategy, run.state.model)

    def on_fit_start(self, run: Run) -> None:
        self._drawn = None

    def on_step_end(self, run: Run) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.draw(run, f"after {run.step:,} outer steps"))
        if self._place is None:
            canvas.draw()
        else:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._place, self._check_lock) as picture:
                canvas.print_png(picture)  # draws first
        self._drawn = run.step
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        run.log({self.name or self.tag: Image(pixels)})

    def on_fit_end(self, run: Run) -> None:
        # Where a run that is over was resumed, its last picture has been drawn.
        if run.step not in (run.start, self._drawn) and not run.terminated:
            self.on_step_end(run)
