"""A callback that draws an episode and the confusion matrix."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import PyTree

from eqxmeta._callback.drawing import Drawing
from eqxmeta._callback.run import Run
from eqxmeta._evaluation.evaluate import with_num_inner_steps
from eqxmeta._evaluation.figure import check_predictions
from eqxmeta._evaluation.plot_confusion import check_confusion, plot_confusion
from eqxmeta._strategy.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Confusion(Drawing):
    """Draws what the model confuses in a fixed few-shot classification task.

        callbacks=[TensorBoard("runs/omniglot"), Confusion(val, every=1000)]

    The picture shows the task's support images, its query images framed green or red for a right
    or wrong prediction, and the confusion matrix. It is drawn at multiples of `every` and at the
    end of the run (`None`: only then) and logged as the image `confusion` (or `name`), which
    TensorBoard shows. Every query is classified by itself, by the model that `inner_adapt` made; by
    one that is transductive (see `eqxmeta.nn.BatchNorm`) the queries of a task together.

    - `tasks`: a task source of images, such as `Episodes`.
    - `path`: a PNG file into which each picture is written, in the place of the one before.
    - `num_tasks`: tasks whose predictions are counted in the matrix. Classes are other ones in
      each: with several, a row is a class of the source, by name, if it names them (`Episodes`
      does) and 20 or fewer were drawn; else the matrix says how often, not what, is confused.
    - `inner_steps`: inner steps to take; `None`: as in training.
    - `seed`: the same seed means the same tasks every time.

    Raises `ImportError` without matplotlib, `ValueError` or `TypeError` for invalid arguments, and
    at the start of a run `OSError` if there cannot be a file at `path`.
    """

    tag = "confusion"
    logs = ()

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
        super().__init__(path, every=every, name=name)
        check_confusion(tasks, num_tasks, inner_steps, seed, "Confusion")
        self._tasks = tasks
        self._arguments = {"num_tasks": num_tasks, "inner_steps": inner_steps, "seed": seed}

    def check(self, strategy: Strategy, model: PyTree) -> None:
        inner_steps = self._arguments["inner_steps"]
        if inner_steps is not None:
            strategy = with_num_inner_steps(strategy, inner_steps)
        check_predictions(
            strategy,
            model,
            self._tasks,
            "Confusion",
            lambda shape, queries: len(shape) == 2,
            "a model with one output for each class",
        )

    def draw(self, run: Run, title: str) -> "Figure":
        model = run.state.model
        return plot_confusion(run.strategy, model, self._tasks, title=title, **self._arguments)
