"""Several seeds of a run as one compiled program, and their statistics."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PRNGKeyArray, PyTree

from ._arguments import check_int, check_seed
from ._chunk import CAPACITY, Job, Report, count_non_finite, train_chunk
from ._errors import explain
from ._model import check_model
from ._pace import Pace
from ._preflight import check_loss, check_outer_update, with_labels
from ._signals import on_interrupt
from ._sources import Sampled, check_device_source, is_device_source
from ._state import TrainState
from ._strategy import Strategy
from ._trainer import Trainer


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


def fit_seeds(
    trainer: Trainer,
    model: PyTree,
    tasks: Any,
    steps: int,
    *,
    seeds: int | Sequence[int] | np.ndarray,
) -> SeedRuns:
    """What `trainer.fit(model, tasks, steps)` computes, for several seeds in one compiled program.

    - `trainer`: without callbacks. Its own seed matters only if `seeds` is a number of them.
    - `model`: one from which every run starts, or a list of one per seed.
    - `tasks`: an `eqx.Module` with `sample(key) -> Task`.
    - `seeds`: distinct seeds; or how many: `trainer.seed`, `trainer.seed + 1`, ...

    Run `i` is that of a trainer with `seed=seeds[i]`, up to rounding. Memory is that of all runs
    together. A run that diverges does not stop the others: a `RuntimeWarning` at the end tells of
    it. The first Ctrl-C and `max_time` end all runs after the current chunk.

    Raises `TypeError` or `ValueError` for invalid arguments.
    """
    if not isinstance(trainer, Trainer):
        expected = "an instance of `eqxmeta.Trainer`"
        raise TypeError(
            explain("`fit_seeds(trainer=...)` is not a trainer.", repr(trainer), expected)
        )
    if trainer.callbacks:
        raise ValueError(
            explain(
                "`fit_seeds(trainer=...)` has callbacks, which watch a single run.",
                ", ".join(type(callback).__name__ for callback in trainer.callbacks),
                "`Trainer(callbacks=[])`; evaluate `runs.state(i).model` afterwards",
            )
        )
    if trainer.on_non_finite != "raise":
        raise ValueError(
            explain(
                "`fit_seeds(trainer=...)` has a policy for NaN and infinity.",
                f"on_non_finite={trainer.on_non_finite!r}",
                "the default: a run that diverges stops no other, and `SeedRuns.finite` tells",
            )
        )
    steps = check_int(steps, "fit_seeds(steps=...)", minimum=1, what="outer steps")
    chosen = _check_seeds(seeds, trainer.seed)
    models = _check_models(model, len(chosen))
    _check_tasks(tasks)
    steps = min(steps, trainer.fast_dev_run or steps)
    deadline = time.monotonic() + trainer.max_time

    inits = [trainer._init(m, "fit_seeds(model=...)") for m in models]
    _check_alike(inits)
    source = Sampled(tasks, trainer.meta_batch_size)
    task = eqx.filter_eval_shape(lambda t: t.sample(jax.random.key(0)), tasks)
    check_loss(trainer.strategy, inits[0].model, with_labels(tasks, task))
    example = eqx.filter_eval_shape(source.first, jax.random.key(0))
    check_outer_update(trainer.strategy, inits[0], example)

    states = _stack(inits * len(chosen) if len(inits) == 1 else inits)
    return _run(trainer, source, states, chosen, steps, deadline)


def _run(
    trainer: Trainer,
    source: Sampled,
    states: TrainState,
    seeds: tuple[int, ...],
    steps: int,
    deadline: float,
) -> SeedRuns:
    roots = jnp.stack([jax.random.key(seed) for seed in seeds])
    # What was not finite to begin with, such as a mask of -inf, is meant to be so.
    meant = jax.device_get(eqx.filter_jit(eqx.filter_vmap(count_non_finite))(states))
    pace = Pace(trainer.steps_per_execution, CAPACITY)
    stopped: list[str] = []
    bad: dict[int, int] = {}  # the first bad step of a run, by its index
    rows: list[dict[str, np.ndarray]] = []
    step, stop = 0, 0  # the first dispatch takes no step: compiles, so that the pace is not misled
    with on_interrupt(lambda: stopped.append("interrupted")):
        while True:
            began = time.monotonic()
            states, report = train_seeds(
                Batch(trainer.strategy, source, roots, jnp.int32(step), jnp.int32(stop)), states
            )
            report = jax.device_get(report)
            taken = stop - step
            metrics = report.metrics.unpacked()
            rows.append({name: values[:, :taken] for name, values in metrics.items()})
            if taken:
                pace.measured(taken, time.monotonic() - began)
                for index, first in _non_finite(rows[-1], report.non_finite, meant).items():
                    bad.setdefault(index, step + first)
            step = stop
            if time.monotonic() > deadline:
                stopped.append("time limit")
            if stopped or step == steps:
                break
            stop = min(steps, step + pace.limit)
    stop_reason = stopped[0] if stopped and step < steps else None
    if stop_reason is not None and trainer.summary:
        print(f"stopped at step {step:,} of {steps:,}: {stop_reason}", flush=True)
    if bad:
        which = ", ".join(f"seed {seeds[i]} at step {bad[i]:,}" for i in sorted(bad))
        message = explain(
            "Runs of `fit_seeds` became NaN or infinite.",
            f"{which} ({len(bad)} of {len(seeds)} runs)",
            "finite metrics and parameters; see `SeedRuns.finite`. The other runs are not affected",
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    metrics = {name: np.concatenate([row[name] for row in rows], axis=1) for name in rows[0]}
    finite = np.array([index not in bad for index in range(len(seeds))])
    return SeedRuns(seeds, states, metrics, finite, steps, stop_reason)


# Bare: to donate is for the outermost program, which is `train_seeds`.
_train_chunk = cast(
    Callable[[Job, TrainState], tuple[TrainState, Report]], inspect.unwrap(train_chunk)
)


class Batch(eqx.Module):
    """What a dispatch reads and keeps; as `_chunk.Job`, with a root key per seed."""

    strategy: Strategy
    source: Sampled
    roots: Key[Array, " n"]
    start: Int[Array, ""]
    stop: Int[Array, ""]


@eqx.filter_jit(donate="all-except-first")
def train_seeds(batch: Batch, states: TrainState) -> tuple[TrainState, Report]:
    """`train_chunk` of every seed: `states` and the report lead with the axis of seeds."""
    dynamic, static = eqx.partition(states, eqx.is_array)

    # The trip count has no axis of seeds, so that the loop over steps remains one loop.
    def one(root: PRNGKeyArray, dynamic: PyTree) -> tuple[PyTree, Report]:
        job = Job(batch.strategy, batch.source, root, batch.start, batch.stop)
        state, report = _train_chunk(job, eqx.combine(dynamic, static))
        return eqx.filter(state, eqx.is_array), report

    dynamic, report = jax.vmap(one)(batch.roots, dynamic)
    return eqx.combine(dynamic, static), report


def _non_finite(
    metrics: dict[str, np.ndarray], counts: list[np.ndarray], meant: list[np.ndarray]
) -> dict[int, int]:
    """The first bad of the steps `1, 2, ...` of a chunk, for the runs `[n]` that have one. A
    parameter is seen at the end of the chunk only."""
    good = np.logical_and.reduce([np.isfinite(rows) for rows in metrics.values()])  # [n, steps]
    sound = np.logical_and.reduce([now <= then for now, then in zip(counts, meant, strict=True)])
    good[:, -1] &= sound
    return {int(i): int(np.argmin(good[i])) + 1 for i in np.flatnonzero(~good.all(axis=1))}


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


def _stack(states: list[TrainState]) -> TrainState:
    def stack(*xs: Any) -> Any:
        return jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0]

    return jax.tree.map(stack, *states)


def _check_seeds(seeds: Any, first: int) -> tuple[int, ...]:
    argument = "fit_seeds(seeds=...)"
    if isinstance(seeds, np.ndarray) and seeds.ndim == 1:
        seeds = list(seeds)
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        seeds = check_int(seeds, argument, minimum=1, what="seeds, or a sequence of distinct seeds")
        seeds = range(first, first + seeds)
    seeds = [check_seed(seed, argument) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            explain(f"`{argument}` is empty or repeats a seed.", seeds, "1 or more distinct seeds")
        )
    return tuple(seeds)


def _check_models(model: Any, n: int) -> list[Any]:
    argument = "fit_seeds(model=...)"
    if not isinstance(model, list | tuple):
        check_model(model, argument)
        return [model]
    if len(model) != n:
        raise ValueError(
            explain(
                f"`{argument}` is not one model per seed.",
                f"{len(model)} models for {n} seeds",
                "a list as long as `seeds`, or one model for all",
            )
        )
    for index, one in enumerate(model):
        check_model(one, f"fit_seeds(model=...)[{index}]")
    return list(model)


def _check_tasks(tasks: Any) -> None:
    if not is_device_source(tasks) and hasattr(tasks, "__getitem__"):
        raise ValueError(
            explain(
                "`fit_seeds(tasks=...)` is read by the host.",
                f"{type(tasks).__name__}, with `tasks[step]`",
                "an `eqx.Module` with `sample(key) -> Task`: each seed draws tasks of its own",
            )
        )
    check_device_source(tasks, "fit_seeds(tasks=...)")


def _check_alike(states: list[TrainState]) -> None:
    """Only arrays may differ from run to run, and only in their values."""
    structure, before = jax.tree.structure(states[0]), _layout(states[0])
    for index, state in enumerate(states[1:], start=1):
        after = _layout(state)
        paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        if paths or jax.tree.structure(state) != structure:
            shown = [f"{path[1:]}: {before.get(path)} and {after.get(path)}" for path in paths]
            raise ValueError(
                explain(
                    f"`fit_seeds(model=...)` differs between models 0 and {index}.",
                    "; ".join(shown)[:500] or "another structure, or another static field",
                    "models that differ in the values of their arrays only",
                )
            )


def _layout(state: TrainState) -> dict[str, str]:
    def show(x: Any) -> str:
        if isinstance(x, np.ndarray):  # not trained: a constant, of which one serves all runs
            return f"numpy {x.dtype.name}{list(x.shape)} of hash {hash(x.tobytes())}"
        return f"{x.dtype.name}{list(x.shape)}" if eqx.is_array(x) else repr(x)

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): show(x) for path, x in leaves}
