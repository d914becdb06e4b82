"""Several runs as one compiled program: of different seeds, or numbers of the strategy."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from .._errors import explain, tell, warn, warnings_end_nothing
from .._loop.chunk import Job, Report, count_non_finite, outer_steps
from .._loop.pace import Pace
from .._loop.signals import Signals
from .._model.state import TrainState
from .._strategy.jit import strategy_jit
from .._strategy.strategy import Strategy
from .._task.device_source import Sampled
from .._task.mesh import divide, divided, replicated
from .trainer import Trainer


class Several(NamedTuple):
    """Where the runs arrived; see `SeedRuns`."""

    states: TrainState
    metrics: dict[str, np.ndarray]
    finite: np.ndarray
    steps: int
    stop_reason: str | None


def fit_several(
    trainer: Trainer,
    source: Sampled,
    states: TrainState,
    seeds: Sequence[int],
    steps: int,
    *,
    names: Sequence[str],
    caller: str,
    make: Callable[..., Strategy] | None = None,
    values: Mapping[str, Array] | None = None,
) -> Several:
    """All outer steps of all runs, each of which has a name, a seed and a state: `states` lead with
    the axis of runs. With `make` the strategy of a run is made of its `values`, `[n]` each."""
    mesh = trainer.mesh
    roots = jnp.stack([jax.random.key(seed) for seed in seeds])
    source = replicated(source, mesh)
    states, roots, numbers = (
        divided(_padded(x, mesh), mesh) for x in (states, roots, dict(values or {}))
    )
    # What was not finite to begin with, such as a mask of -inf, is meant to be so.
    meant = eqx.filter_jit(eqx.filter_vmap(count_non_finite))(states)
    meant = jax.device_get(_first(meant, len(seeds)))
    pace = Pace(trainer.steps_per_execution)
    stopped: list[str] = []
    bad: dict[int, int] = {}  # the first bad step of a run, by its index
    rows: list[dict[str, np.ndarray]] = []
    step, stop = 0, 0  # the first dispatch takes no step: compiles, so that the pace is not misled
    deadline = math.inf
    with Signals(signal.SIGINT, talk=trainer.summary) as signals:
        signals.stop = stopped.append
        activity = "compiling", time.monotonic(), True
        signals.activity = lambda: None if signals.begun else activity
        while True:
            began = time.monotonic()
            first, last = replicated((jnp.int32(step), jnp.int32(stop)), mesh)
            batch = Batch(trainer.strategy, source, roots, first, last, mesh, make, numbers)
            states, report = train_several(batch, states)
            report = jax.device_get(_first(report, len(seeds)))
            taken = stop - step
            rows.append(report.metrics.rows(taken))
            if not taken:
                signals.begin()
                deadline = time.monotonic() + trainer.max_time
            else:
                pace.measured(taken, time.monotonic() - began)
                for index, first in _non_finite(rows[-1], report.non_finite, meant).items():
                    bad.setdefault(index, step + first)
            step = stop
            if taken and time.monotonic() > deadline:
                stopped.append("time limit")
            if stopped or step == steps:
                break
            stop = min(steps, step + pace.limit)
    stop_reason = stopped[0] if stopped and step < steps else None
    if stop_reason is not None and trainer.summary:
        tell(f"stopped at step {step:,} of {steps:,}: {stop_reason}")
    if bad:
        which = ", ".join(f"{names[i]} at step {bad[i]:,}" for i in sorted(bad))
        message = f"Runs of `{caller}` became NaN or infinite."
        received = f"{which} ({len(bad)} of {len(seeds)} runs)"
        expected = "finite metrics and parameters; see `finite` of the result. The other runs go on"
        with warnings_end_nothing():
            warn(explain(message, received, expected))
    metrics = {name: np.concatenate([row[name] for row in rows], axis=1) for name in rows[0]}
    finite = np.array([index not in bad for index in range(len(seeds))])
    if mesh is not None:
        states = jax.device_put(_first(states, len(seeds)), mesh.devices.flat[0])
    return Several(states, metrics, finite, steps, stop_reason)


class Batch(eqx.Module):
    """What a dispatch reads and keeps; as `Job`, with a root key for each run. The devices of
    `mesh` share the runs. With `make` the strategies are made of `values`, `strategy` is the first.
    """

    strategy: Strategy
    source: Sampled
    roots: Key[Array, " n"]
    start: Int[Array, ""]
    stop: Int[Array, ""]
    mesh: Mesh | None = None
    make: Callable[..., Strategy] | None = None
    values: dict[str, Float[Array, " n"]] = eqx.field(default_factory=dict)


@strategy_jit(donate=True)
def train_several(batch: Batch, states: TrainState) -> tuple[TrainState, Report]:
    """`outer_steps` of every run: `states` and the report lead with the axis of runs."""
    dynamic, static = eqx.partition(states, eqx.is_array)

    # The trip count has no axis of runs, so that the loop over steps remains one loop. Nor has the
    # step that a strategy sees: what it computes from some step on only is not computed before.
    def one(batch: Batch, root: PRNGKeyArray, values: dict[str, Array], dynamic: PyTree):
        strategy = batch.strategy if batch.make is None else batch.make(**values)
        job = Job(strategy, batch.source, root, batch.start, batch.stop)
        state = eqx.tree_at(lambda s: s.step, eqx.combine(dynamic, static), batch.start)
        state, report = outer_steps(job, state)
        return eqx.filter(state, eqx.is_array), report

    bare = eqx.tree_at(lambda b: (b.roots, b.values), batch, (None, None))
    shared, others = eqx.partition(bare, eqx.is_array)

    def several(parts: tuple[Any, ...], shared: Batch) -> tuple[PyTree, Report]:
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(eqx.combine(shared, others), *parts)

    run = several if batch.mesh is None else divide(several, batch.mesh, results="divided")
    dynamic, report = run((batch.roots, batch.values, dynamic), shared)
    return eqx.combine(dynamic, static), report


def _non_finite(
    metrics: dict[str, np.ndarray], counts: list[np.ndarray], meant: list[np.ndarray]
) -> dict[int, int]:
    """The first bad of the steps `1, 2, ...` of a chunk, for the runs `[n]` that have one. A
    parameter is seen at the end of the chunk only."""
    good = np.logical_and.reduce([np.isfinite(rows) for rows in metrics.values()])  # [n, steps]
    pairs = zip(counts, meant, strict=True)  # of arrays, each `[n, 2]`
    sound = np.logical_and.reduce([(now <= then).all(axis=-1) for now, then in pairs])
    good[:, -1] &= sound
    return {int(i): int(np.argmin(good[i])) + 1 for i in np.flatnonzero(~good.all(axis=1))}


def _padded(tree: Any, mesh: Mesh | None) -> Any:
    """The last run again, until every device has as many."""
    if mesh is None:
        return tree

    def pad(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        return jnp.concatenate([x, *[x[-1:]] * (-len(x) % mesh.size)])

    return jax.tree.map(pad, tree)


def _first(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[:n] if eqx.is_array(x) else x, tree)


def stack(states: list[TrainState]) -> TrainState:
    def stack(*xs: Any) -> Any:
        return jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0]

    return jax.tree.map(stack, *states)
