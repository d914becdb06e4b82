"""The training program: any number of outer steps in one dispatch of one compiled function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ._sources import Loaded, Sampled
from ._state import TrainState
from ._strategy import Strategy

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
    strategy: Strategy, source: Sampled | Loaded, root: PRNGKeyArray, slot: Any, state: TrainState
) -> tuple[TrainState, dict[str, Array]]:
    """Outer step `state.step`: its tasks and its randomness depend on (seed, step) alone."""
    key = jax.random.fold_in(root, state.step)
    tasks = source.batch(slot, key)
    # Apart from the keys of the tasks, and free where no model asks for it: hashing keys is a
    # tenth of the time of a step on a small model.
    update_key = jax.random.fold_in(key, _UPDATE)
    new, metrics = strategy.outer_update(state, tasks, key=update_key)
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

    def step(slot: Any, dynamic: PyTree) -> tuple[PyTree, dict[str, Array]]:
        state = eqx.combine(dynamic, static)
        new, metrics = outer_step(job.strategy, job.source, job.root, slot, state)
        return eqx.filter(new, eqx.is_array), metrics

    _, metrics = jax.eval_shape(step, jnp.zeros((), jnp.int32), dynamic)
    buffer = jax.tree.map(lambda m: jnp.zeros((CAPACITY, *m.shape), m.dtype), metrics)

    def body(index: Any, carry: tuple[PyTree, dict[str, Array]]):
        dynamic, buffer = carry
        slot = index - job.start
        dynamic, metrics = step(slot, dynamic)
        return dynamic, jax.tree.map(lambda b, m: b.at[slot].set(m), buffer, metrics)

    dynamic, metrics = jax.lax.fori_loop(job.start, job.stop, body, (dynamic, buffer))
    state = eqx.combine(dynamic, static)
    return state, Report(metrics, finite_leaves(state))


def finite_leaves(state: TrainState) -> list[Bool[Array, ""]]:
    leaves = [x for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)]
    return [jnp.all(jnp.isfinite(x)) for x in leaves]
