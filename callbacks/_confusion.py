import io
from pathlib import Path
from typing import Any

import numpy as np

from eqxmeta._arguments import check_int
from eqxmeta._callback import Callback, Image
from eqxmeta._container import replacing
from eqxmeta._plot_confusion import check_confusion, plot_confusion
from eqxmeta._run import Run


class Confusion(Callback):
    """Draws what the model confuses in a fixed few-shot classification task.

        callbacks=[TensorBoard("runs/omniglot"), Confusion(val, every=1000)]

    The picture shows the task's support images, its query images framed green or red for a right
    or wrong prediction, and the confusion matrix. It is drawn at multiples of `every` and at the
    end of the run (`None`: only then) and published as the image `confusion` (or `name`), which
    TensorBoard shows. Every query is classified by itself, by the model that `inner_adapt` made.

    - `tasks`: a task source of images, such as `Episodes`.
    - `path`: a PNG file into which each picture is written, in the place of the one before.
    - `num_tasks`: tasks whose predictions are counted in the matrix. Classes are other ones in
      each, so that with several the matrix says how often, not what, is confused.
    - `inner_steps`: inner steps to take; `None`: as in training.
    - `seed`: the same seed means the same tasks every time.

    Raises `ImportError` without matplotlib, `ValueError` or `TypeError` for invalid arguments.
    """

    publishes = ()

    def __init__(
        self,
        tasks: Any,
        path: str | Path | None = None,
        *,
        every: int | None = None,
        num_tasks: int = 1,
        inner_steps: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ):
        if every is not None:
            every = check_int(every, "Confusion(every=...)", minimum=1, what="outer steps, or None")
        check_confusion(tasks, num_tasks, inner_steps, seed, "Confusion")
        self.path = None if path is None else Path(path)
        self.writes = path is not None
        self.every = every
        self.name = name
        self._tasks = tasks
        self._arguments = {"num_tasks": num_tasks, "inner_steps": inner_steps, "seed": seed}
        self._drawn: int | None = None  # at which step
        self._restored = False

    def on_fit_start(self, run: Run) -> None:
        if not self._restored:
            self._drawn = None
        self._restored = False

    def on_step_end(self, run: Run) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        title = f"after {run.step:,} outer steps"
        model = run.state.model
        figure = plot_confusion(run.strategy, model, self._tasks, title=title, **self._arguments)
        canvas = FigureCanvasAgg(figure)
        file = io.BytesIO()
        canvas.print_png(file)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as picture:
                picture.write(file.getvalue())
        self._drawn = run.step
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        run.log({self.name or "confusion": Image(pixels)})

    def on_fit_end(self, run: Run) -> None:
        if self._drawn != run.step:
            self.on_step_end(run)

    def state_dict(self) -> dict[str, Any]:
        # So that resuming a run that is over does not publish its last picture twice.
        return {} if self._drawn is None else {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state.get("drawn")
        self._restored = True
