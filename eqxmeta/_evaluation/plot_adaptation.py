"""A figure of adaptation to one-dimensional regression tasks. Needs matplotlib, when called."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_int
from .._errors import explain
from .._keys import used_again
from .._strategy.jit import strategy_jit
from .._strategy.strategy import Strategy
from .._task.examples import examples
from .._task.task import Task
from .evaluate import with_num_inner_steps
from .figure import FAINT, INK, adapted_predictions, check_figure, new_figure, without_padding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Query points with which a source that lets us choose their number draws a smooth curve.
_DENSE = 400

_TASK = {"color": INK, "lw": 1.5, "ls": (0, (1, 1.2)), "label": "the task", "zorder": 5}
_SUPPORT = {"color": "#d1495b", "edgecolors": "white", "label": "support", "zorder": 6}
_BEFORE = {"color": "#8d99ae", "lw": 1.6, "ls": "--", "label": "before adapting", "zorder": 2}


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
    - `inner_steps`: of those that have inner steps. Others are drawn adapted.
    - the others: see `AdaptationPlot`.

    The figure is a plain `matplotlib.figure.Figure`: no display, and nothing of pyplot's.
    The numbers in a panel are mean squared errors on the task's query examples.
    """
    inner_steps, num_tasks, seed = check_plot(
        tasks, inner_steps, num_tasks, seed, "plot_adaptation"
    )
    if not learners:
        message = "`plot_adaptation(learners=...)` is empty."
        raise ValueError(explain(message, learners, "one learner or more"))
    sampled, key = _sample(tasks, num_tasks, seed)
    drawn = jax.tree.map(np.asarray, sampled)
    alone = len(learners) == 1
    rows, columns = (1, num_tasks) if alone else (num_tasks, len(learners))
    figure = new_figure(3.6 * columns, 2.9 * rows + 0.6)
    # One scale for all: a small task is a small matter.
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    # The tasks set it: a prediction that runs away should be seen to leave.
    sets = drawn.support, drawn.query
    truth = np.concatenate([without_padding(batch)[1].ravel() for batch in sets])
    margin = 0.3 * np.ptp(truth) + 1e-3
    panels[0, 0].set_ylim(truth.min() - margin, truth.max() + margin)
    for i, (name, (strategy, model)) in enumerate(learners.items()):
        steps = (0, *sorted(inner_steps)) if strategy.num_inner_steps() is not None else (None,)
        predictions = [
            _predictions(taking(strategy, k), model, sampled, used_again(key)) for k in steps
        ]
        for j in range(num_tasks):
            panel = panels[0, j] if alone else panels[j, i]
            task = jax.tree.map(lambda leaf, j=j: leaf[j].ravel(), drawn)
            x, _, *weight = task.pooled
            curves = {
                k: without_padding((x, np.asarray(y[j]), *weight))[1]
                for k, y in zip(steps, predictions, strict=True)
            }
            task = Task(without_padding(task.support), without_padding(task.query))
            _draw(panel, task, curves)
            if not alone and j == 0:
                panel.set_title(name, color=INK, fontsize=12, pad=18)
    for panel in panels[-1]:
        panel.set_xlabel("x", color=INK)
    for panel in panels[:, 0]:
        panel.set_ylabel("y", color=INK)
    found = [panel.get_legend_handles_labels() for panel in panels[0]]
    entries = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    labels, lines = list(entries), list(entries.values())
    legend = {"loc": "outside lower center", "frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(lines, labels, ncols=3 * columns - 1, **legend)
    if title:
        figure.suptitle(title, color=INK, fontsize=12)
    return figure


def taking(strategy: Strategy, steps: int | None) -> Strategy:
    """The same strategy, taking so many inner steps; `None`: it has none."""
    return strategy if steps is None else with_num_inner_steps(strategy, steps)


def _draw(panel: "Axes", task: Task, curves: Mapping[int | None, np.ndarray]) -> None:
    """One task. `curves`: predictions at the inputs of `task.pooled`, by number of inner steps."""
    from matplotlib import colormaps

    x, y = task.pooled
    support_x, support_y = task.support
    order = np.argsort(x)
    panel.plot(x[order], y[order], **_TASK)
    panel.scatter(support_x, support_y, s=46, linewidths=0.9, **_SUPPORT)
    colours = iter(colormaps["Blues"](np.linspace(0.45, 0.95, max(len(curves) - 1, 1))))
    for k, prediction in curves.items():
        label = "adapted" if k is None else f"after {k} step{'s' * (k > 1)}"
        after = {"lw": 2.2, "label": label, "zorder": 3}
        style = _BEFORE if k == 0 else {"color": next(colours), **after}
        panel.plot(x[order], prediction[order], **style)
    query = slice(len(support_x), None)
    errors = [np.mean((prediction[query] - y[query]) ** 2) for prediction in curves.values()]
    text = "mse  " + " → ".join(f"{error:.2g}" for error in errors)
    panel.text(0, 1.02, text, transform=panel.transAxes, fontsize=9, color=FAINT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(color=FAINT, labelcolor=INK, labelsize=9)


@strategy_jit()
def _predictions(strategy: Strategy, model: PyTree, tasks: Task, key: PRNGKeyArray) -> Array:
    """Of the adapted models, at all support and query inputs: `[tasks, support + query]`."""

    def one(task: Task) -> Array:
        x, _, weight = examples(task.pooled)
        return adapted_predictions(strategy, model, task.support, x, key, weight).ravel()

    return jax.vmap(one)(tasks)


def _sample(tasks: Any, num_tasks: int, seed: int) -> tuple[Task, PRNGKeyArray]:
    """A batch of tasks, with many query points if the source lets us choose; and a key for all else
    that is random."""
    source = tasks
    if dataclasses.is_dataclass(tasks) and hasattr(tasks, "queries"):
        source = dataclasses.replace(tasks, queries=max(_DENSE, tasks.queries))  # pyright: ignore
    sample = source.sample  # pyright: ignore
    key = jax.random.key(seed)
    return jax.vmap(sample)(jax.random.split(key, num_tasks)), jax.random.fold_in(key, num_tasks)


def check_plot(
    tasks: Any, inner_steps: Sequence[int], num_tasks: int, seed: int, caller: str
) -> tuple[tuple[int, ...], int, int]:
    """The numbers as Python's own. Raises `ImportError`, `TypeError` or `ValueError` before
    anything is computed."""
    num_tasks, seed = check_figure(
        tasks,
        num_tasks,
        seed,
        caller,
        can_draw=lambda x, y: x.shape[1:] == y.shape[1:] == (1,),
        problem="is not one-dimensional regression",
        expected="(x, y) with x, y: [examples, 1]",
    )
    argument = f"{caller}(inner_steps=...)"
    sound, expected = isinstance(inner_steps, Sequence), "one or more numbers, such as (1, 10)"
    check_argument(sound and inner_steps, inner_steps, argument, expected, TypeError)
    steps = tuple(check_int(k, argument, minimum=1, what="inner steps") for k in inner_steps)
    return steps, num_tasks, seed
