"""The result of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .._direction import Mode
from .._errors import explain
from .interval import half_width95
from .predictions import PerClass, Predictions, per_class


def values_of(metrics: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """In float64. Raises `KeyError`."""
    if name not in metrics:
        expected = f"one of {tuple(metrics)}"
        raise KeyError(explain("There is no such metric.", repr(name), expected))
    return np.asarray(metrics[name], np.float64)


@dataclass(frozen=True)
class Evaluation:
    """Query metrics of every task at every inner step.

    - `values[name]`: `[num_tasks, inner_steps + 1]`; column 0 is before adaptation,
      NaN for a strategy that predicts nothing before (`ProtoNet`).
    - `transductive`: whether the model predicts the queries of a task together, so that a
      prediction depends on the other queries (`eqxmeta.nn.BatchNorm`). Not comparable with results
      that are not.
    - `tasks`: `[num_tasks]`, a number for each task, by which `compare` knows whether another
      evaluation was on the same ones; `None` if that is not known.
    - `seed`: with which they were drawn.
    - `directions`: which way metrics improve, as the strategy's losses declare it.
    - `predictions`: of `evaluate(..., predictions=True)`, else `None`.
    """

    values: Mapping[str, np.ndarray]
    transductive: bool = False
    tasks: np.ndarray | None = None
    seed: int | None = None
    directions: Mapping[str, Mode] = field(default_factory=dict)
    predictions: Predictions | None = None

    def __repr__(self) -> str:
        tasks = len(next(iter(self.values.values()), ()))
        half = {k: f" ± {self.ci95(k)[-1]:.2g}" if tasks > 1 else "" for k in self.values}
        last = (f"{k}={self.mean(k)[-1]:.4g}{half[k]}" for k in self.values)
        what = f"{tasks} task{'s' * (tasks != 1)}, after adaptation: {', '.join(last)}"
        return f"Evaluation({what}, transductive={self.transductive})"

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.values)

    def mean(self, name: str = "loss") -> np.ndarray:
        """Mean over tasks, `[inner_steps + 1]`."""
        return values_of(self.values, name).mean(axis=0)

    def ci95(self, name: str = "loss") -> np.ndarray:
        """Half-width of the 95% interval of the mean over tasks, `[inner_steps + 1]`: standard
        errors times the quantile of Student's t with `num_tasks - 1` degrees of freedom; NaN for a
        single task."""
        return half_width95(values_of(self.values, name))

    def per_class(self) -> PerClass:
        """How well each class of the source was recognised: accuracy with its 95% interval over the
        tasks that had it, and for which class it was most often taken. A table to print, the worst
        first; its `rows` are `ClassResult`s.

        Raises `ValueError` without predictions, or if the source does not say which of its classes
        a label of a task stands for, as `eqxmeta.tasks.Episodes` does.
        """
        return per_class(self.predictions)
