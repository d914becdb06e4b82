"""The training program: any number of outer steps in one dispatch of one compiled function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ._sources import Loaded, Sampled
from ._state import TrainState
from ._strategy import Strategy
from ._task import Task

# Rows of the metrics buffer, and so the most steps of one dispatch. Always the same, so that
# no choice of callbacks or chunk lengths ever makes another program.
CAPACITY = 1024

_UPDATE = 0x75706474


class Job(eqx.Module):
    """What a dispatch reads and keeps: everything but the state, which it consumes."""

    strategy: Strategy
    source: Sampled | Loaded
    root: PRNGKeyArray
    start: Int[Array, ""]
    stop: Int[Array, ""]


class Report(eqx.Module):
    """What a dispatch tells the host.

    - `metrics`: a row per step, `[CAPACITY]` each; rows beyond `stop - start` are zero.
    - `finite`: whether each inexact array of the state is finite after the last step.
    """

    metrics: dict[str, Array]
    finite: list[Bool[Array, ""]]


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


@eqx.filter_jit(donate="all-except-first")
def train_chunk(job: Job, state: TrainState) -> tuple[TrainState, Report]:
    """Outer steps `start` to `stop`, at most `CAPACITY`. The trip count is an argument, so that
    every length shares this program and the result does not depend on where it was cut."""
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(dynamic: PyTree, tasks: Task, key: PRNGKeyArray) -> tuple[PyTree, dict[str, Array]]:
        new, metrics = outer_step(job.strategy, eqx.combine(dynamic, static), tasks, key)
        return eqx.filter(new, eqx.is_array), metrics

    def body(index: Any, tasks: Task, key: PRNGKeyArray, carry: tuple[PyTree, dict[str, Array]]):
        dynamic, buffer = carry
        dynamic, metrics = step(dynamic, tasks, key)
        row = index - job.start
        return dynamic, jax.tree.map(lambda b, m: b.at[row].set(m), buffer, metrics)

    tasks = jax.eval_shape(job.source.first, job.root)
    _, metrics = jax.eval_shape(step, dynamic, tasks, job.root)
    buffer = jax.tree.map(lambda m: jnp.zeros((CAPACITY, *m.shape), m.dtype), metrics)

    def key_of(index: Any) -> PRNGKeyArray:
        return jax.random.fold_in(job.root, index)

    carry = dynamic, buffer
    dynamic, metrics = job.source.for_each_step(job.start, job.stop, key_of, body, carry)
    state = eqx.combine(dynamic, static)
    return state, Report(metrics, finite_leaves(state))


def finite_leaves(state: TrainState) -> list[Bool[Array, ""]]:
    leaves = [x for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)]
    return [jnp.all(jnp.isfinite(x)) for x in leaves]
