"""A figure of what a model confuses in a few-shot classification task. Needs matplotlib, when
called."""

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
from .draw_confusion import draw_images, draw_matrix
from .evaluate import with_num_inner_steps
from .figure import INK, adapted_predictions, check_figure, new_figure, without_padding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More would be too small to be seen.
_MAX_QUERIES = 10
_MAX_CLASSES = 20
_LONGEST_NAME = 24

_ADAPTING = 0x61646170


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
    draw_images(images, first, shown, shots, queries, titles)
    draw_matrix(panel, matrix, bool((guesses < 0).any()), axis)
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
