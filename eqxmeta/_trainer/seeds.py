"""Several seeds of a run as one compiled program."""

import math
import signal
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_int
from .._errors import explain, tell, warn, warnings_end_nothing
from .._loop.chunk import Job, Report, count_non_finite, outer_steps
from .._loop.pace import Pace
from .._loop.signals import Signals
from .._model.state import TrainState
from .._preflight.outer_update import check_outer_update
from .._strategy.jit import strategy_jit
from .._strategy.strategy import Strategy
from .._task.device_source import Sampled
from .._task.mesh import divide, divided, replicated
from .._task.processes import Processes
from .seed_arguments import check_alike, check_models, check_seeds, check_source
from .seed_runs import SeedRuns
from .start import initial_state
from .trainer import Trainer


def fit_seeds(
    trainer: Trainer,
    model: PyTree,
    tasks: Any,
    steps: int,
    *,
    seeds: int | Sequence[int] | np.ndarray,
) -> SeedRuns:
    """What `trainer.fit(model, tasks, steps)` computes, for several seeds in one compiled program.

    - `trainer`: without callbacks. Its own seed matters only if `seeds` is a number of them. Its
      `devices` share the seeds, and need no communication.
    - `model`: one from which every run starts, or a list of one per seed.
    - `tasks`: an `eqx.Module` with `sample(key) -> Task`.
    - `seeds`: distinct seeds; or how many: `trainer.seed`, `trainer.seed + 1`, ...

    Run `i` is that of a trainer with `seed=seeds[i]`, up to rounding. Memory is that of all runs
    together. A run that diverges does not stop the others: a `RuntimeWarning` at the end tells of
    it. The first Ctrl-C and `max_time` end all runs after the current chunk.

    Raises `TypeError` or `ValueError` for invalid arguments.
    """
    argument = "fit_seeds(trainer=...)"
    expected = "an instance of `eqxmeta.Trainer`"
    sound, fault = isinstance(trainer, Trainer), "is not a trainer"
    check_argument(sound, trainer, argument, expected, TypeError, fault)
    if Processes(trainer.mesh).several:
        message = f"`{argument}` shares its devices with other processes."
        expected = "`Trainer(devices=jax.local_devices())`: seeds of its own in each process"
        raise ValueError(explain(message, f"devices of {jax.process_count()} processes", expected))
    if trainer.callbacks:
        message = f"`{argument}` has callbacks, which watch a single run."
        received = ", ".join(type(callback).__name__ for callback in trainer.callbacks)
        expected = "`Trainer(callbacks=[])`; evaluate `runs.state(i).model` afterwards"
        raise ValueError(explain(message, received, expected))
    if trainer.on_non_finite != "raise":
        message = f"`{argument}` has a policy for NaN and infinity."
        received = f"on_non_finite={trainer.on_non_finite!r}"
        expected = "the default: a run that diverges stops no other, and `SeedRuns.finite` tells"
        raise ValueError(explain(message, received, expected))
    steps = check_int(steps, "fit_seeds(steps=...)", minimum=1, what="outer steps")
    chosen = check_seeds(seeds, trainer.seed)
    models = check_models(model, len(chosen))
    check_source(tasks)
    steps = min(steps, trainer.fast_dev_run or steps)

    strategy = trainer.strategy
    inits = [initial_state(strategy, m, "fit_seeds(model=...)") for m in models]
    check_alike(inits)
    source = Sampled(tasks, trainer.meta_batch_size)
    check_outer_update(strategy, inits[0], source.example)
    states = _stack(inits * len(chosen) if len(inits) == 1 else inits)
    return _run(trainer, source, states, chosen, steps)


def _run(
    trainer: Trainer,
    source: Sampled,
    states: TrainState,
    seeds: tuple[int, ...],
    steps: int,
) -> SeedRuns:
    mesh = trainer.mesh
    roots = jnp.stack([jax.random.key(seed) for seed in seeds])
    source = replicated(source, mesh)
    states, roots = (divided(_padded(x, mesh), mesh) for x in (states, roots))
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
            batch = Batch(trainer.strategy, source, roots, first, last, mesh)
            states, report = train_seeds(batch, states)
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
        which = ", ".join(f"seed {seeds[i]} at step {bad[i]:,}" for i in sorted(bad))
        message = "Runs of `fit_seeds` became NaN or infinite."
        received = f"{which} ({len(bad)} of {len(seeds)} runs)"
        expected = "finite metrics and parameters; see `SeedRuns.finite`. The other runs go on"
        with warnings_end_nothing():
            warn(explain(message, received, expected))
    metrics = {name: np.concatenate([row[name] for row in rows], axis=1) for name in rows[0]}
    finite = np.array([index not in bad for index in range(len(seeds))])
    if mesh is not None:
        states = jax.device_put(_first(states, len(seeds)), mesh.devices.flat[0])
    return SeedRuns(seeds, states, metrics, finite, steps, stop_reason)


class Batch(eqx.Module):
    """What a dispatch reads and keeps; as `Job`, with a root key per seed. The devices of `mesh`
    share the seeds."""

    strategy: Strategy
    source: Sampled
    roots: Key[Array, " n"]
    start: Int[Array, ""]
    stop: Int[Array, ""]
    mesh: Mesh | None = None


@strategy_jit(donate=True)
def train_seeds(batch: Batch, states: TrainState) -> tuple[TrainState, Report]:
    """`outer_steps` of every seed: `states` and the report lead with the axis of seeds."""
    dynamic, static = eqx.partition(states, eqx.is_array)

    # The trip count has no axis of seeds, so that the loop over steps remains one loop. Nor has the
    # step that a strategy sees: what it computes from some step on only is not computed before.
    def one(batch: Batch, root: PRNGKeyArray, dynamic: PyTree) -> tuple[PyTree, Report]:
        job = Job(batch.strategy, batch.source, root, batch.start, batch.stop)
        state = eqx.tree_at(lambda s: s.step, eqx.combine(dynamic, static), batch.start)
        state, report = outer_steps(job, state)
        return eqx.filter(state, eqx.is_array), report

    shared, others = eqx.partition(eqx.tree_at(lambda b: b.roots, batch, None), eqx.is_array)

    def several(parts: tuple[Any, PyTree], shared: Batch) -> tuple[PyTree, Report]:
        return jax.vmap(one, in_axes=(None, 0, 0))(eqx.combine(shared, others), *parts)

    run = several if batch.mesh is None else divide(several, batch.mesh, results="divided")
    dynamic, report = run((batch.roots, dynamic), shared)
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
    """The last seed again, until every device has as many."""
    if mesh is None:
        return tree

    def pad(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        return jnp.concatenate([x, *[x[-1:]] * (-len(x) % mesh.size)])

    return jax.tree.map(pad, tree)


def _first(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[:n] if eqx.is_array(x) else x, tree)


def _stack(states: list[TrainState]) -> TrainState:
    def stack(*xs: Any) -> Any:
        return jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0]

    return jax.tree.map(stack, *states)
