"""Where runs that differ in their seeds arrived, and their statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np

from .._errors import explain
from .._evaluation.interval import half_width95
from .._evaluation.result import values_of
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
            expected = f"{-n} to {n - 1}, as an index of {n} seeds"
            raise IndexError(explain("There is no such run.", index, expected))
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.states)

    def mean(self, name: str = "loss") -> np.ndarray:
        """Mean over seeds, `[steps]`; not finite where a run is not. Raises `KeyError`."""
        with np.errstate(invalid="ignore"):
            return values_of(self.metrics, name).mean(axis=0)

    def ci95(self, name: str = "loss") -> np.ndarray:
        """Half-width of the 95% interval of the mean over seeds, `[steps]`: standard errors times
        the quantile of Student's t with n - 1 degrees of freedom; not finite where a run is not.

        Raises `ValueError` if there is one seed only, `KeyError` for an unknown metric.
        """
        values = values_of(self.metrics, name)
        if len(values) < 2:
            message = "An interval over seeds cannot be computed."
            raise ValueError(explain(message, "1 seed", "2 or more seeds"))
        with np.errstate(invalid="ignore"):
            return half_width95(values)
