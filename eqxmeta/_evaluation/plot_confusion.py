"""A figure of what a model confuses in a few-shot classification task. Needs matplotlib, when
called."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._arguments import check_int_or_none
from .._keys import used_again
from .._model.predict import predicted_class, without_absent
from .._strategy.jit import strategy_jit
from .._strategy.strategy import Strategy
from .._task.examples import examples
from .._task.task import Task
from .curve import says_classes
from .evaluate import with_num_inner_steps
from .figure import FAINT, INK, adapted_predictions, check_figure, new_figure, without_padding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More would be too small to be seen.
_MAX_QUERIES = 10
_MAX_CLASSES = 20
_LONGEST_NAME = 24

_ADAPTING = 0x61646170

_RIGHT, _WRONG = "#2a9d8f", "#d1495b"


def plot_confusion(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    *,
    num_tasks: int = 1,
    inner_steps: int | None = None,
    seed: int = 0,
    title: str = "",
) -> "Figure":
    """What an adapted model takes for what: a task in pictures, and the confusion matrix.

    On the left a row a class: its support images, then up to 10 of its query images, framed green
    if they were recognised, else red with the number of the class they were taken for. On the
    right the matrix `[ways, ways]`: of the queries of a class (row), how many were predicted to be
    of which (column). A query of which a logit is NaN was taken for none, in a column of its own.

    Classes have the names that the source gives them (`Episodes` does). The matrix of several tasks
    then has a row for each class that was in any, if these are 20 or fewer: which classes are
    confused, whatever their places in the tasks. A row counts those tasks that its class was in.
    See `Confusion` for the arguments.

    The figure is a plain `matplotlib.figure.Figure`: no display, and nothing of pyplot's.
    """
    num_tasks, inner_steps, seed = check_confusion(
        tasks, num_tasks, inner_steps, seed, "plot_confusion"
    )
    if inner_steps is not None:
        strategy = with_num_inner_steps(strategy, inner_steps)
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    found = jax.tree.map(np.asarray, _classified(strategy, model, tasks, keys))
    drawn, predicted, classes = found
    ways = int(max(drawn.support[1].max(), drawn.query[1].max())) + 1
    titles = _titles(ways, None if classes is None else classes[0], tasks)
    guesses, (labels, *weights) = predicted, drawn.query[1:]
    axis, rows = titles, ways
    if num_tasks > 1:
        axis = [str(label) for label in range(ways)]
        if classes is not None and len(met := np.unique(classes[classes >= 0])) <= _MAX_CLASSES:
            axis, rows = [_name_of(number, tasks) for number in met.tolist()], len(met)
            labels, guesses = (_places(x, classes, met) for x in (labels, guesses))
    guesses, labels = without_padding((guesses, labels, *weights))
    matrix = confusion_matrix(labels.ravel(), guesses.ravel(), rows)

    first, shown = jax.tree.map(lambda leaf: leaf[0], (drawn, predicted))
    shown, _ = without_padding((shown, *first.query[1:]))
    first = Task(without_padding(first.support), without_padding(first.query))
    shots = _most_examples(first.support[1])
    queries = min(_most_examples(first.query[1]), _MAX_QUERIES)
    columns = shots + queries + 1  # one is the gap
    side = max(0.3, min(0.7, 10 / columns))  # of an image, in inches
    right = min(max(2.8, 0.42 * len(axis) + 1), 6.5)
    longest = max(map(len, [*titles, *axis])) - 1  # letters beside a digit
    size = side * columns + right + 0.8, max(3.4, side * ways + 1.4, right + 0.6)
    figure = new_figure(size[0] + 0.14 * longest, size[1] + 0.08 * longest)
    images, panel = figure.subplots(1, 2, width_ratios=[side * columns + 0.6, right])
    _draw_images(images, first, shown, shots, queries, titles)
    _draw_matrix(panel, matrix, bool((guesses < 0).any()), axis)
    accuracy = np.trace(matrix) / matrix.sum()
    of = "this task" if num_tasks == 1 else f"{num_tasks} tasks, the first of which is shown"
    lines = ([title] if title else []) + [f"{accuracy:.1%} of {matrix.sum()} queries right in {of}"]
    figure.suptitle("\n".join(lines), color=INK, fontsize=11)
    return figure


def confusion_matrix(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], ways: int
) -> Int[np.ndarray, "ways classes"]:
    """How often an example of class `i` was predicted to be of class `j`, at `[i, j]`: `ways`
    classes, or more if the model has more and predicts them. If any was predicted to be of none
    (-1), the last column is for these."""
    classes = max(ways, int(predicted.max(initial=0)) + 1)
    matrix = np.zeros((ways, classes + 1), int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix if (predicted < 0).any() else matrix[:, :classes]


def _places(
    labels: Int[np.ndarray, "tasks queries"],
    classes: Int[np.ndarray, "tasks ways"],
    met: Int[np.ndarray, " met"],
) -> Int[np.ndarray, "tasks queries"]:
    """Where the class that each label stands for is in `met`; -1 for what is no label of its
    task."""
    known = (labels >= 0) & (labels < classes.shape[1])
    numbers = np.take_along_axis(classes, np.where(known, labels, 0), 1)
    return np.where(known & (numbers >= 0), np.searchsorted(met, numbers), -1)


def _titles(ways: int, classes: Int[np.ndarray, " ways"] | None, tasks: Any) -> list[str]:
    """Of the labels of a task: `0`, or `0 Avocado` where the source says what it is."""
    titles = [str(label) for label in range(ways)]
    for label, number in enumerate([] if classes is None else classes.tolist()):
        if number >= 0:  # else the task does not have that label
            titles[label] += f" {_name_of(number, tasks)}"
    return titles


def _name_of(number: int, tasks: Any) -> str:
    names = getattr(tasks, "names", None)
    name = str(number if names is None else names[number])
    # Names that begin alike often end differently.
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 10]}…{name[-9:]}"


def _draw_images(
    panel: "Axes",
    task: Task,
    predicted: np.ndarray,
    shots: int,
    queries: int,
    titles: Sequence[str],
) -> None:
    from matplotlib.patches import Rectangle

    (support, support_y), (query, query_y) = task.support, task.query
    low, high = min(support.min(), query.min()), max(support.max(), query.max())
    ways = int(support_y.max()) + 1
    # Where most pixels are at the low end, they are paper and the rest is ink.
    colours = "gray_r" if np.median(query) - low < 0.05 * (high - low) else "gray"

    def draw(
        image: np.ndarray, row: int, column: float | int, colour: str, wrong: str = ""
    ) -> None:
        pixels = np.clip((_channels_last(image) - low) / (high - low + 1e-12), 0, 1)
        extent = (column + 0.06, column + 0.94, row + 0.94, row + 0.06)
        panel.imshow(pixels, cmap=colours, vmin=0, vmax=1, extent=extent, interpolation="nearest")
        frame = Rectangle(
            (column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor=colour, linewidth=1.8
        )
        panel.add_patch(frame)
        if wrong:
            style = {"color": "white", "fontsize": 7, "fontweight": "bold"}
            box = {"facecolor": _WRONG, "edgecolor": "none", "pad": 1.2}
            at = (column + 0.9, row + 0.9)
            panel.text(*at, wrong, ha="right", va="bottom", bbox=box, **style)

    for label in range(ways):
        for column, index in enumerate(np.flatnonzero(support_y == label)):
            draw(support[index], label, column, FAINT)
        for column, index in enumerate(np.flatnonzero(query_y == label)[:queries]):
            right = predicted[index] == label
            wrong = "" if right else _name(int(predicted[index]))
            draw(query[index], label, shots + 0.5 + column, _RIGHT if right else _WRONG, wrong)
    width = shots + 0.5 + queries
    panel.set_xlim(-0.02, width + 0.02)
    panel.set_ylim(ways + 0.02, -0.02)
    panel.set_aspect("equal")
    panel.spines[:].set_visible(False)
    centres = [shots / 2, shots + 0.5 + queries / 2]
    panel.set_xticks(centres, ["support", "queries (red: taken for class)"])
    panel.xaxis.tick_top()
    panel.set_yticks(np.arange(ways) + 0.5, titles[:ways])
    panel.set_ylabel("class", color=INK)
    panel.tick_params(length=0, labelcolor=INK, labelsize=9)


def _name(predicted: int) -> str:
    return str(predicted) if predicted >= 0 else "none"


def _draw_matrix(panel: "Axes", matrix: np.ndarray, none: bool, axis: Sequence[str]) -> None:
    ways, columns = matrix.shape
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(matrix.shape):
        if matrix[row, column]:
            colour = "white" if shares[row, column] > 0.5 else INK
            style = {"ha": "center", "va": "center", "fontsize": 9 if ways <= 10 else 6}
            panel.text(column, row, str(matrix[row, column]), color=colour, **style)
    # A model may have more classes than the task.
    more = [str(number) for number in range(len(axis), columns - none)]
    upright = {} if max(map(len, axis)) <= 2 else {"rotation": 40, "ha": "right"}
    panel.set_xticks(np.arange(columns), [*axis, *more, *["none"] * none], **upright)
    panel.set_yticks(np.arange(ways), axis)
    panel.set_xlabel("predicted", color=INK)
    panel.set_ylabel("class", color=INK)
    panel.tick_params(length=0, labelcolor=INK, labelsize=9 if ways <= 10 else 6)
    panel.spines[:].set_color(FAINT)


@strategy_jit()
def _classified(
    strategy: Strategy, model: PyTree, tasks: Any, keys: Array
) -> tuple[Task, Int[Array, "tasks queries"], Int[Array, "tasks ways"] | None]:
    """The tasks; the label that the adapted model gives each query; and the source's class that
    each label of a task stands for, if it says so."""

    def one(key: Array) -> tuple[Task, Array, Array | None]:
        classes = tasks.classes(used_again(key)) if says_classes(tasks) else None
        task = tasks.sample(key)
        # Another stream than that of the tasks, which is the key itself.
        adapting = jax.random.fold_in(key, _ADAPTING)
        x, y, weight = examples(task.query)
        logits = adapted_predictions(strategy, model, task.support, x, adapting, weight)
        return task, predicted_class(without_absent(logits, y, weight)), classes

    return jax.lax.map(one, keys)


def _most_examples(labels: np.ndarray) -> int:
    return int(np.bincount(labels).max())


def _channels_last(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return image
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)


def _are_labelled_images(x: Any, y: Any) -> bool:
    images = x.ndim == 3 or (x.ndim == 4 and x.shape[1] in (1, 3))
    return images and y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)


def check_confusion(
    tasks: Any, num_tasks: int, inner_steps: int | None, seed: int, caller: str
) -> tuple[int, int | None, int]:
    """The numbers as Python's own. Raises `ImportError`, `TypeError` or `ValueError` before
    anything is computed."""
    num_tasks, seed = check_figure(
        tasks,
        num_tasks,
        seed,
        caller,
        can_draw=_are_labelled_images,
        problem="does not classify images",
        expected="(x, y) with x: [examples, height, width] or [examples, 1 or 3 channels, "
        "height, width], y: [examples] of integers",
    )
    argument = f"{caller}(inner_steps=...)"
    inner_steps = check_int_or_none(inner_steps, argument, minimum=1, what="inner steps")
    return num_tasks, inner_steps, seed
