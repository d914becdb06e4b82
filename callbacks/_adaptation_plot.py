"""A callback that draws how a model adapts to a few tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import PyTree

from eqxmeta._arguments import check_path
from eqxmeta._callback.drawing import Drawing
from eqxmeta._callback.run import Run
from eqxmeta._evaluation.figure import check_predictions
from eqxmeta._evaluation.plot_adaptation import check_plot, plot_adaptation, taking
from eqxmeta._strategy.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AdaptationPlot(Drawing):
    """Draws how the model adapts to a few one-dimensional regression tasks, into the PNG `path`.

    Each panel is a task: its function, the support examples, and the model's prediction before
    and after inner steps. The picture is drawn at multiples of `every` and at the end of the run
    (`None`: only then), replaces the one before, and is logged as the image `adaptation` (or
    `name`). The panels are those of `plot_adaptation`.

    - `tasks`: a task source, `sample(key) -> Task`, of examples `x, y: [examples, 1]`.
    - `inner_steps`: the numbers of inner steps after which the prediction is drawn. Of a strategy
      without inner steps (`CNP`, `R2D2`) it is drawn adapted.
    - `num_tasks`, `seed`: how many tasks; the same seed means the same tasks every time.

    Raises `ImportError` without matplotlib, `ValueError` or `TypeError` for invalid arguments, and
    at the start of a run `OSError` if there cannot be a file at `path`.
    """

    tag = "adaptation"
    logs = ()

    def __init__(
        self,
        tasks: Any,
        path: str | Path,
        *,
        every: int | None = None,
        inner_steps: Sequence[int] = (1, 10),
        num_tasks: int = 3,
        seed: int = 0,
        name: str | None = None,
    ):
        check_plot(tasks, inner_steps, num_tasks, seed, "AdaptationPlot")
        super().__init__(check_path(path, "AdaptationPlot(path=...)"), every=every, name=name)
        self._tasks = tasks
        self._arguments = {"inner_steps": inner_steps, "num_tasks": num_tasks, "seed": seed}

    def check(self, strategy: Strategy, model: PyTree) -> None:
        check_predictions(
            taking(strategy, None if strategy.num_inner_steps() is None else 1),
            model,
            self._tasks,
            "AdaptationPlot",
            lambda shape, queries: math.prod(shape) == queries,
            "a model with one output",
        )

    def draw(self, run: Run, title: str) -> "Figure":
        learner = {"": (run.strategy, run.state.model)}
        return plot_adaptation(learner, self._tasks, title=title, **self._arguments)
