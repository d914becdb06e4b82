"""What adapted models predicted, and how well they know each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import explain
from .._model.predict import predicted_class, without_absent
from .._table import Table
from .interval import half_width95, shown


@dataclass(frozen=True, repr=False)
class Predictions:
    """What the adapted models predicted for the queries of every task.

    - `outputs`: `[num_tasks, queries, ...]`, logits `[num_tasks, queries, ways]` for example.
    - `targets`: `[num_tasks, queries, ...]`, the query set's `y`.
    - `weights`: `[num_tasks, queries]`, 0 for what is padding; `None`: all queries count alike.
    - `classes`: `[num_tasks, ways]`, the number of the source's class for which each label of a
      task stands; `None` if the source does not say.
    - `names`: of the source's classes, by number; `None` if they have none.
    """

    outputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    classes: np.ndarray | None = None
    names: Sequence[str] | None = None

    def __repr__(self) -> str:
        tasks, queries = self.targets.shape[:2]
        return f"Predictions({tasks} tasks of {queries} queries, outputs {self.outputs.shape})"

    @property
    def predicted(self) -> np.ndarray:
        """The label of the largest logit, `[num_tasks, queries]`; -1 where a logit is NaN.
        Raises `ValueError` unless the outputs are logits."""
        if self.outputs.ndim != 3 or self.targets.dtype.kind not in "iu":
            message = "These predictions are not of classes."
            received = f"outputs {self.outputs.shape}, targets of {self.targets.dtype}"
            expected = "outputs [num_tasks, queries, ways], targets of integers"
            raise ValueError(explain(message, received, expected))
        found = jax.tree.map(jnp.asarray, (self.outputs, self.targets, self.weights))
        return np.asarray(predicted_class(jax.vmap(without_absent)(*found)))

    def name(self, number: int) -> str:
        return str(number) if self.names is None else str(self.names[number])


@dataclass(frozen=True)
class ClassResult:
    """How well the queries of one class were recognised.

    - `name`: of the class, or its number in the source.
    - `accuracy`, `ci95`: mean over the tasks that had the class, and the half-width of its 95%
      interval (Student's t; NaN for a single task).
    - `tasks`: how many these are.
    - `taken_for`: for which class most of its wrong queries were taken; `None` if there are none,
      or those are the ones of which a logit is NaN.
    - `share`: which part of its queries these are.
    """

    name: str
    accuracy: float
    ci95: float
    tasks: int
    taken_for: str | None
    share: float


@dataclass(frozen=True, repr=False)
class PerClass(Table):
    """`rows`: a `ClassResult` for each class that was in a task, the worst first. Print it."""

    rows: tuple[ClassResult, ...]

    def cells(self) -> list[list[str]]:
        lines = [["class", "accuracy", "tasks", "most often taken for"]]
        for row in self.rows:
            taken = "" if row.taken_for is None else f"{row.taken_for} ({row.share:.1%})"
            accuracy = shown("accuracy", row.accuracy, row.ci95)
            lines.append([row.name, accuracy, str(row.tasks), taken])
        return lines


def per_class(found: Predictions | None) -> PerClass:
    """See `Evaluation.per_class`."""
    if found is None or found.classes is None:
        message = "`per_class()` does not know the classes."
        received = "an evaluation without predictions"
        expected = "`evaluate(..., predictions=True)`"
        if found is not None:
            received = "tasks of a source that does not say which class each label stands for"
            expected = "a source with `classes(key) -> [ways]`, such as `eqxmeta.tasks.Episodes`"
        raise ValueError(explain(message, received, expected))
    predicted, targets, classes = found.predicted, found.targets, found.classes
    weights = np.ones(targets.shape) if found.weights is None else found.weights
    known = (predicted >= 0) & (predicted < classes.shape[1])
    results = []
    for number in np.unique(classes):
        tasks, labels = np.nonzero(classes == number)
        # Its own queries, in each task that has any.
        own = np.where(targets[tasks] == labels[:, None], weights[tasks], 0)
        tasks, labels, own = (x[own.any(1)] for x in (tasks, labels, own))
        if not len(tasks):
            continue
        hits = predicted[tasks] == labels[:, None]
        accuracies = (own * hits).sum(1) / own.sum(1)
        wrong, at = np.nonzero((own > 0) & ~hits & known[tasks])
        others = classes[tasks[wrong], predicted[tasks[wrong], at]]
        taken, share = None, 0.0
        if len(others):
            numbers, counts = np.unique(others, return_counts=True)
            taken, share = found.name(int(numbers[counts.argmax()])), counts.max() / (own > 0).sum()
        half = float(half_width95(accuracies))
        name, accuracy = found.name(int(number)), float(accuracies.mean())
        results.append(ClassResult(name, accuracy, half, len(tasks), taken, float(share)))
    return PerClass(tuple(sorted(results, key=lambda row: row.accuracy)))
