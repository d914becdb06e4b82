import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from eqxmeta._arguments import check_int, check_seed
from eqxmeta._callback import Callback, Image
from eqxmeta._errors import explain
from eqxmeta._evaluate import with_inner_steps
from eqxmeta._files import replace
from eqxmeta._run import Run
from eqxmeta._sources import check_device_source
from eqxmeta._strategy import Strategy
from eqxmeta._task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Query points with which a source that lets us choose their number draws a smooth curve.
_DENSE = 400

_INK, _FAINT = "#333333", "#9a9a9a"
_SUPPORT = "#d1495b"
_BEFORE = "#8d99ae"
_AFTER = ("#8ecae6", "#1d5fa8", "#0b2545")


class AdaptationPlot(Callback):
    """Draws how the model adapts to a few one-dimensional regression tasks, into the PNG `path`.

    Each panel is a task: its function, the support examples, and the model's prediction before
    and after inner steps. The picture is drawn at multiples of `every` and at the end of the run
    (`None`: only then), replaces the one before, and is published as an image.

    - `tasks`: a task source, `sample(key) -> Task`, of examples `x, y: [examples, 1]`.
    - `inner_steps`: the numbers of inner steps after which the prediction is drawn.
    - `num_tasks`, `seed`: how many tasks; the same seed means the same tasks every time.

    Raises `ImportError` without matplotlib, `ValueError` or `TypeError` for invalid arguments.
    """

    writes = True

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
        _matplotlib()
        if every is not None:
            check_int(every, "AdaptationPlot(every=...)", minimum=1, what="outer steps, or None")
        _check(tasks, inner_steps, num_tasks, seed, "AdaptationPlot")
        self.path = Path(path)
        self.every = every
        self.name = name
        self._tasks = tasks
        self._arguments = {"inner_steps": inner_steps, "num_tasks": num_tasks, "seed": seed}
        self._drawn: int | None = None

    def on_step_end(self, run: Run) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        model = run.state.model
        title = f"after {run.step:,} outer steps"
        figure = plot_adaptation({"": (run.strategy, model)}, self._tasks, title=title, **self._arguments)
        canvas = FigureCanvasAgg(figure)
        file = io.BytesIO()
        canvas.print_png(file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self.path, file.getvalue())
        self._drawn = run.step
        run.log({self.name or "adaptation": Image(np.asarray(canvas.buffer_rgba())[..., :3].copy())})

    def on_fit_end(self, run: Run) -> None:
        if self._drawn != run.step:
            self.on_step_end(run)

    def state_dict(self) -> dict[str, Any]:
        # So that resuming a run that is over does not publish its last picture twice.
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]


def plot_adaptation(
    learners: Mapping[str, tuple[Strategy, PyTree]],
    tasks: Any,
    *,
    inner_steps: Sequence[int] = (1, 10),
    num_tasks: int = 3,
    seed: int = 0,
    title: str = "",
) -> "Figure":
    """How learners adapt to the same one-dimensional regression tasks, side by side.

        figure = plot_adaptation({"MAML": (maml, maml_state.model),
                                  "Joint": (joint, joint_state.model)}, tasks)
        figure.savefig("adaptation.png")

    - `learners`: `(strategy, TrainState.model)` by name. With several, each is a column and each
      task a row; with one, the tasks are side by side.
    - the others: see `AdaptationPlot`.

    The figure is a plain `matplotlib.figure.Figure`: no display, and nothing of pyplot's.
    The numbers in a panel are mean squared errors on the task's query examples.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    _check(tasks, inner_steps, num_tasks, seed, "plot_adaptation")
    if not learners:
        raise ValueError(explain("`plot_adaptation(learners=...)` is empty.", learners, "at least one"))
    steps = (0, *sorted(inner_steps))
    drawn = _sample(tasks, num_tasks, seed)
    alone = len(learners) == 1
    rows, columns = (1, num_tasks) if alone else (num_tasks, len(learners))
    size = (3.6 * columns, 2.9 * rows + 0.6)
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    # Tasks have scales of their own; learners on the same task are compared on one.
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=False if alone else "row")
    for i, (name, (strategy, model)) in enumerate(learners.items()):
        predictions = [_predictions(_taking(strategy, k), model, drawn) for k in steps]
        for j in range(num_tasks):
            panel = panels[0, j] if alone else panels[j, i]
            task = jax.tree.map(lambda leaf, j=j: np.asarray(leaf[j], np.float64).ravel(), drawn)
            curves = {k: np.asarray(y[j], np.float64) for k, y in zip(steps, predictions, strict=True)}
            _draw(panel, task, curves)
            if not alone and j == 0:
                panel.annotate(name, (0.5, 1.14), xycoords="axes fraction", ha="center", size=12, color=_INK)
    for panel in panels[-1]:
        panel.set_xlabel("x", color=_INK)
    for panel in panels[:, 0]:
        panel.set_ylabel("y", color=_INK)
    lines, labels = panels[0, 0].get_legend_handles_labels()
    width = min(len(labels), 2 * columns)
    figure.legend(lines, labels, loc="outside lower center", ncols=width, frameon=False, labelcolor=_INK)
    if title:
        figure.suptitle(title, color=_INK, fontsize=12)
    return figure


def _draw(panel: "Axes", task: Task, curves: Mapping[int, np.ndarray]) -> None:
    """One task. `curves`: predictions by the number of inner steps, at the inputs of `task.pooled`."""
    (support_x, support_y), (query_x, query_y) = task.support, task.query
    x, truth = task.pooled
    order = np.argsort(x)
    panel.plot(x[order], truth[order], color=_INK, lw=1.5, ls=(0, (1, 1.2)), label="the task", zorder=5)
    colours = iter(_AFTER[-len(curves) + 1 :] if len(curves) <= len(_AFTER) + 1 else _spread(len(curves) - 1))
    for k, y in curves.items():
        if k == 0:
            panel.plot(x[order], y[order], color=_BEFORE, lw=1.6, ls="--", label="before adapting", zorder=2)
        else:
            label = f"after {k} step" + "s" * (k > 1)
            panel.plot(x[order], y[order], color=next(colours), lw=2.2, label=label, zorder=3)
    panel.scatter(
        support_x, support_y, s=46, color=_SUPPORT, edgecolors="white", linewidths=0.9, label="support", zorder=6
    )
    # The task sets the scale: a prediction that runs away should be seen to leave.
    margin = 0.4 * np.ptp(truth) + 1e-3
    panel.set_ylim(truth.min() - margin, truth.max() + margin)
    errors = [np.mean((y[len(support_x) :] - query_y) ** 2) for y in curves.values()]
    text = "mse  " + " → ".join(f"{error:.2g}" for error in errors)
    panel.set_title(text, loc="left", fontsize=9, color=_FAINT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_FAINT)
    panel.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)


@eqx.filter_jit
def _predictions(strategy: Strategy, model: PyTree, tasks: Task) -> Array:
    """Of the adapted models, at all support and query inputs: `[tasks, support + query]`."""

    def one(task: Task) -> Array:
        adapted = strategy.inner_adapt(model, task.support, key=None)
        x, _ = task.pooled
        return jax.vmap(eqx.nn.inference_mode(adapted))(x).ravel()

    return jax.vmap(one)(tasks)


def _taking(strategy: Strategy, steps: int) -> Strategy:
    if not hasattr(getattr(strategy, "inner", None), "steps"):
        raise ValueError(
            explain(
                "An adaptation cannot be drawn step by step.",
                f"`{type(strategy).__name__}`, which has no `InnerLoop` in a field `inner`",
                "a strategy that has one",
            )
        )
    return with_inner_steps(strategy, steps)


def _sample(tasks: Any, num_tasks: int, seed: int) -> Task:
    if dataclasses.is_dataclass(tasks) and hasattr(tasks, "queries"):
        tasks = dataclasses.replace(tasks, queries=max(_DENSE, tasks.queries))  # pyright: ignore
    return jax.vmap(tasks.sample)(jax.random.split(jax.random.key(seed), num_tasks))


def _check(tasks: Any, inner_steps: Sequence[int], num_tasks: int, seed: int, caller: str) -> None:
    check_int(num_tasks, f"{caller}(num_tasks=...)", minimum=1, what="tasks")
    check_seed(seed, f"{caller}(seed=...)")
    if not isinstance(inner_steps, Sequence) or not inner_steps:
        expected = "numbers of inner steps, such as (1, 10)"
        raise TypeError(explain(f"`{caller}(inner_steps=...)` is invalid.", repr(inner_steps), expected))
    for steps in inner_steps:
        check_int(steps, f"{caller}(inner_steps=...)", minimum=1, what="inner steps")
    task = check_device_source(tasks, f"{caller}(tasks=...)")
    for examples in (task.support, task.query):
        shapes = [leaf.shape for leaf in jax.tree.leaves(examples)]
        if not isinstance(examples, tuple) or [shape[1:] for shape in shapes] != [(1,), (1,)]:
            raise ValueError(
                explain(
                    f"`{caller}(tasks=...)` is not one-dimensional regression.",
                    f"examples of shapes {shapes}",
                    "(x, y) with x, y: [examples, 1]",
                )
            )


def _spread(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["Blues"](shade) for shade in np.linspace(0.35, 1.0, number)]


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = explain("Adaptation cannot be drawn.", "no matplotlib", "pip install 'eqxmeta[examples]'")
        raise ImportError(message) from error
