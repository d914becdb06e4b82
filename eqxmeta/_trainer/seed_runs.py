"""Where runs that differ in their seeds arrived, and their statistics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np

from .._errors import explain
from .._model.state import TrainState


@dataclass(frozen=True)
class SeedRuns:
    """Where `n` runs that differ in their seeds arrived, and how they got there.

    - `states`: all runs as one state, every array with a leading axis `[n]`.
    - `metrics[name]`: `[n, steps]`, of the outer steps taken.
    - `finite`: `[n]`, False for a run in which a metric or a parameter became NaN or infinite.
    - `steps`: the outer steps that were asked for.
    - `stop_reason`: `None` if they were taken, else why not: `"interrupted"`, `"time limit"`.
    """

    seeds: tuple[int, ...]
    states: TrainState
    metrics: Mapping[str, np.ndarray]
    finite: np.ndarray
    steps: int
    stop_reason: str | None

    def __repr__(self) -> str:
        parts = [f"{len(self.seeds)} seeds", f"{len(next(iter(self.metrics.values()))[0]):,} steps"]
        if "loss" in self.metrics:
            parts.append(f"mean loss {self.mean()[-1]:.4g}")
        if not self.finite.all():
            parts.append(f"{(~self.finite).sum()} not finite")
        return f"SeedRuns({', '.join(parts)})"

    def state(self, index: int) -> TrainState:
        """The state that the run of `seeds[index]` reached. Raises `IndexError`."""
        n = len(self.seeds)
        if not -n <= index < n:
            raise IndexError(explain("There is no such run.", index, f"0 to {n - 1}, of {n} runs"))
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.states)

    def mean(self, name: str = "loss") -> np.ndarray:
        """Mean over seeds, `[steps]`; not finite where a run is not. Raises `KeyError`."""
        with np.errstate(invalid="ignore"):
            return self._of(name).mean(axis=0)

    def ci95(self, name: str = "loss") -> np.ndarray:
        """Half-width of the 95% interval of the mean over seeds, `[steps]`: standard errors times
        the quantile of Student's t with n - 1 degrees of freedom; not finite where a run is not.

        Raises `ValueError` if there is one seed only, `KeyError` for an unknown metric.
        """
        values = self._of(name)
        n = len(values)
        if n < 2:
            raise ValueError(
                explain("An interval over seeds cannot be computed.", "1 seed", "2 or more seeds")
            )
        with np.errstate(invalid="ignore"):
            return student_t95(n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)

    def _of(self, name: str) -> np.ndarray:
        if name not in self.metrics:
            expected = f"one of {tuple(self.metrics)}"
            raise KeyError(explain("There is no such metric.", repr(name), expected))
        return np.asarray(self.metrics[name], np.float64)


def student_t95(df: int) -> float:
    """The two-sided 95% quantile of Student's t: the finite series of Abramowitz and Stegun,
    26.7.3 and 26.7.4, in the angle atan(t / sqrt(df)), by bisection."""

    def within(angle: float) -> float:
        term = math.cos(angle) if df % 2 else 1.0
        total = 0.0
        for k in range(df % 2, df - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if df % 2 else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)
