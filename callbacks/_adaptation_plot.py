import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_folder, check_int, check_path
from eqxmeta._callback import Callback, Image
from eqxmeta._container import replacing
from eqxmeta._plot_adaptation import check_plot, plot_adaptation
from eqxmeta._run import Run


class AdaptationPlot(Callback):
    """Draws how the model adapts to a few one-dimensional regression tasks, into the PNG `path`.

    Each panel is a task: its function, the support examples, and the model's prediction before
    and after inner steps. The picture is drawn at multiples of `every` and at the end of the run
    (`None`: only then), replaces the one before, and is published as the image `adaptation` (or
    `name`). The panels are those of `plot_adaptation`.

    - `tasks`: a task source, `sample(key) -> Task`, of examples `x, y: [examples, 1]`.
    - `inner_steps`: the numbers of inner steps after which the prediction is drawn.
    - `num_tasks`, `seed`: how many tasks; the same seed means the same tasks every time.

    Raises `ImportError` without matplotlib, `ValueError` or `TypeError` for invalid arguments.
    """

    writes = True
    publishes = ()

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
        if every is not None:
            every = check_int(
                every, "AdaptationPlot(every=...)", minimum=1, what="outer steps, or None"
            )
        check_plot(tasks, inner_steps, num_tasks, seed, "AdaptationPlot")
        self.path = check_path(path, "AdaptationPlot(path=...)")
        self.every = every
        self.name = name
        self._tasks = tasks
        self._arguments = {"inner_steps": inner_steps, "num_tasks": num_tasks, "seed": seed}
        self._drawn: int | None = None  # at which step
        self._restored = False

    def refuse(self, run: Run) -> None:
        check_folder(self.path.absolute().parent, "AdaptationPlot(path=...)")

    def on_fit_start(self, run: Run) -> None:
        if not self._restored:
            self._drawn = None
        self._restored = False

    def on_step_end(self, run: Run) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        learner = {"": (run.strategy, run.state.model)}
        title = f"after {run.step:,} outer steps"
        figure = plot_adaptation(learner, self._tasks, title=title, **self._arguments)
        canvas = FigureCanvasAgg(figure)
        file = io.BytesIO()
        canvas.print_png(file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as picture:
            picture.write(file.getvalue())
        self._drawn = run.step
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        run.log({self.name or "adaptation": Image(pixels)})

    def on_fit_end(self, run: Run) -> None:
        if self._drawn != run.step:
            self.on_step_end(run)

    def state_dict(self) -> dict[str, Any]:
        # So that resuming a run that is over does not publish its last picture twice.
        return {} if self._drawn is None else {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state.get("drawn")
        self._restored = True
