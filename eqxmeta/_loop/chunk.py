"""The training program: any number of outer steps in one dispatch of one compiled function."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._model.state import TrainState
from .._strategy.jit import strategy_jit
from .._strategy.metrics import SKIPPED, MetricColumns, columns
from .._strategy.strategy import Strategy
from .._task.device_source import Loaded, Sampled
from .._task.mesh import keep_replicated, over_devices
from .._task.task import Task

# Rows of the metrics buffer, and so the most steps of one dispatch. Always the same, so that
# no choice of callbacks or chunk lengths ever makes another program.
CAPACITY = 1024

_UPDATE = 0x75706474


class Job(eqx.Module):
    """What a dispatch reads and keeps: everything but the state, which it consumes.

    `skip`: an outer step with a metric, or a number in its new state, that is not finite is not
    taken. (Another program, for it looks at every number of the state at every step.)
    `mesh`: the devices that share the tasks of a step, where there are several.
    """

    strategy: Strategy
    source: Sampled | Loaded
    root: PRNGKeyArray
    start: Int[Array, ""]
    stop: Int[Array, ""]
    skip: bool = False
    mesh: Mesh | None = None


class Report(eqx.Module):
    """What a dispatch tells the host.

    - `metrics`: a row per step, `[CAPACITY, columns]`; rows beyond `stop - start` are zero.
    - `non_finite`: of each inexact array of the state, how many numbers are not finite after the
      last step, and how many of those are NaN.
    """

    metrics: MetricColumns
    non_finite: list[Int[Array, "2"]]


def outer_step(
    strategy: Strategy, state: TrainState, tasks: Task, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One outer step; `key` is that of the step, from which its tasks were drawn as well."""
    new, metrics = strategy.outer_update(state, tasks, key=jax.random.fold_in(key, _UPDATE))
    # The step is the trainer's, and dtypes may not drift from one iteration to the next.
    new = TrainState(state.step + 1, new.model, new.opt_state)
    return jax.tree.map(_like, new, state), metrics


def _like(new: Any, old: Any) -> Any:
    return jnp.asarray(new, old.dtype) if eqx.is_array(old) else old


def taken_if_finite(
    old: PyTree, new: PyTree, metrics: dict[str, Array]
) -> tuple[PyTree, dict[str, Array]]:
    """`new` if it and `metrics` are finite, otherwise `old`; and which of the two, as a metric.

    Numbers of the state that were not finite before, such as a mask's, may stay what they were.
    """
    sound = [jnp.all(jnp.isfinite(x)) for x in columns(metrics).arrays]
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if eqx.is_inexact_array(a):
            same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
            sound.append(jnp.all(jnp.isfinite(b) | same))
    taken = jnp.all(jnp.stack(sound))
    kept = jax.tree.map(lambda a, b: jnp.where(taken, b, a), old, new)
    return kept, metrics | {SKIPPED: (~taken).astype(jnp.int32)}


def outer_steps(job: Job, state: TrainState) -> tuple[TrainState, Report]:
    """Outer steps `start` to `stop`, at most `CAPACITY`. The trip count is an argument, so that
    every length shares one program and the result does not depend on where it was cut."""
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(dynamic: PyTree, tasks: Task, key: PRNGKeyArray) -> tuple[PyTree, MetricColumns]:
        old = eqx.combine(dynamic, static)
        new, metrics = outer_step(job.strategy, old, tasks, key)
        if job.skip:
            kept = eqx.filter((old.model, old.opt_state), eqx.is_array)
            taken = eqx.filter((new.model, new.opt_state), eqx.is_array)
            kept, metrics = taken_if_finite(kept, taken, metrics)
            return TrainState(new.step, *kept), columns(metrics)
        return eqx.filter(new, eqx.is_array), columns(metrics)

    def body(index: Any, tasks: Task, key: PRNGKeyArray, carry: tuple[PyTree, MetricColumns]):
        dynamic, buffer = carry
        dynamic, metrics = step(dynamic, tasks, key)
        row = index - job.start

        def put(rows: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(rows, new, row, axis=0)

        return dynamic, jax.tree.map(put, buffer, metrics)

    tasks = jax.eval_shape(job.source.first, job.root)
    _, metrics = jax.eval_shape(step, dynamic, tasks, job.root)
    buffer = jax.tree.map(lambda m: jnp.zeros((CAPACITY, *m.shape), m.dtype), metrics)

    key_of = key_of_step(job.root)
    carry = dynamic, buffer
    dynamic, metrics = job.source.for_each_step(job.start, job.stop, key_of, body, carry)
    state = eqx.combine(dynamic, static)
    return state, Report(metrics, count_non_finite(state))


@strategy_jit(donate=True)
def train_chunk(job: Job, state: TrainState) -> tuple[TrainState, Report]:
    """`outer_steps`, compiled; `state` is consumed."""
    with over_devices(job.mesh):
        return keep_replicated(outer_steps(job, state), job.mesh)


def key_of_step(root: PRNGKeyArray) -> Callable[[Any], PRNGKeyArray]:
    return lambda index: jax.random.fold_in(root, index)


def count_non_finite(state: TrainState) -> list[Int[Array, "2"]]:
    leaves = [x for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)]
    # NaN apart: a -inf of a mask that an optimizer turns into NaN is one number as before.
    return [jnp.stack([jnp.sum(~jnp.isfinite(x)), jnp.sum(jnp.isnan(x))]) for x in leaves]
