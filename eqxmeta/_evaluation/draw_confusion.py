"""The two panels of `plot_confusion`: a task in pictures, and the confusion matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._task.task import Task
from .figure import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RIGHT, _WRONG = "#2a9d8f", "#d1495b"


def draw_images(
    panel: "Axes",
    task: Task,
    predicted: np.ndarray,
    shots: int,
    queries: int,
    titles: Sequence[str],
) -> None:
    """A row a class: its `shots` support images, then `queries` at most, framed by what they were
    `predicted` to be."""
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


def draw_matrix(panel: "Axes", matrix: np.ndarray, none: bool, axis: Sequence[str]) -> None:
    """`none`: whether the last column is for queries that were taken for no class."""
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


def _name(predicted: int) -> str:
    return str(predicted) if predicted >= 0 else "none"


def _channels_last(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return image
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)
