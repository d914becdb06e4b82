"""Where several runs arrived: of other seeds, with their statistics; of a grid, with the best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_seed
from .._bar import progress
from .._errors import explain
from .._evaluation.curve import Point
from .._evaluation.evaluate import check_steps, measure
from .._evaluation.interval import half_width95
from .._evaluation.result import Evaluation, values_of
from .._evaluation.tasks import check_tasks
from .._model.state import TrainState
from .._strategy.strategy import Strategy


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
        return state_of(self.states, index, len(self.seeds))

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


@dataclass(frozen=True, repr=False)
class GridRuns:
    """Where the runs of a grid arrived, a run for each point, and how they got there.

    - `points`: the numbers of each run, by name.
    - `strategies`: of each run, as `make_trainer(**point)` gave it.
    - `states`, `metrics`, `finite`, `steps`, `stop_reason`: as in `SeedRuns`; `n` is the number of
      points.
    """

    points: tuple[Mapping[str, float], ...]
    strategies: tuple[Strategy, ...]
    states: TrainState
    metrics: Mapping[str, np.ndarray]
    finite: np.ndarray
    steps: int
    stop_reason: str | None
    make: Callable[..., Strategy]

    @property
    def names(self) -> tuple[str, ...]:
        """Of each run, such as `"outer=0.001, inner=0.01"`."""
        return tuple(name_of(point) for point in self.points)

    def __repr__(self) -> str:
        taken = len(next(iter(self.metrics.values()))[0])
        parts = [f"{len(self.points)} points", f"{taken:,} steps"]
        if not self.finite.all():
            parts.append(f"{(~self.finite).sum()} not finite")
        return f"GridRuns({', '.join(parts)})"

    def state(self, run: int | str) -> TrainState:
        """The state that a run reached, by index or name. Raises `IndexError` or `KeyError`."""
        return state_of(self.states, self._index(run), len(self.points))

    def strategy(self, run: int | str) -> Strategy:
        """The strategy of a run, by index or name. Raises `IndexError` or `KeyError`."""
        return self.strategies[self._index(run)]

    def evaluate(
        self, tasks: Any, *, num_tasks: int = 600, inner_steps: int | None = None, seed: int = 0
    ) -> dict[str, Evaluation]:
        """`eqxmeta.evaluate` of every run, by its name, on the same tasks: one compiled program.

            board = em.leaderboard(runs.evaluate(validation))
            best = runs.state(board.places[0].name)

        Arguments and errors are those of `eqxmeta.evaluate`. A run that is not finite is NaN, and
        last of a leaderboard.
        """
        first = self.strategies[0]
        steps = check_steps(first, inner_steps, "GridRuns.evaluate")
        seed = check_seed(seed, "GridRuns.evaluate(seed=...)")
        task, num_tasks = check_tasks(tasks, num_tasks, "GridRuns.evaluate")
        results = {}
        with progress(num_tasks * len(self.points), "tasks") as advance:
            for index, name in enumerate(self.names):
                values = {k: jnp.asarray(v) for k, v in self.points[index].items()}
                results[name] = measure(
                    self.strategies[index], self.state(index).model, tasks, task,
                    num_tasks=num_tasks, steps=steps, seed=seed, advance=advance,
                    argument="GridRuns.evaluate(tasks=...)", point=Point(first, self.make, values),
                )  # fmt: skip
        return results

    def _index(self, run: int | str) -> int:
        if isinstance(run, str):
            if run not in self.names:
                expected = f"an index, or one of {self.names}"
                raise KeyError(explain("There is no such run.", repr(run), expected))
            return self.names.index(run)
        return run


def name_of(point: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.6g}" for name, value in point.items())


def state_of(states: TrainState, index: int, n: int) -> TrainState:
    """One of `n` states that are stacked. Raises `IndexError`."""
    if not -n <= index < n:
        expected = f"{-n} to {n - 1}, as an index of {n} runs"
        raise IndexError(explain("There is no such run.", index, expected))
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, states)
