"""The result of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .._errors import explain


def half_width95(values: np.ndarray) -> np.ndarray:
    """Of the 95% interval, by Student's t, of the mean over the first axis; NaN if that is 1 long,
    for of one number there is no interval."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    from scipy.special import stdtrit  # takes a while to import; JAX depends on SciPy

    n = len(values)
    return stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(n)


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
    """

    values: Mapping[str, np.ndarray]
    transductive: bool = False

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
