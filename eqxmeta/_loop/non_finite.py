"""NaN and infinity in a run: at which outer step they began, and the state before it.

A healthy run pays nothing for this. The metrics of every step, and a count for every array of the
state, come from the device anyway; only once they tell of trouble is the chunk computed again, from
its start to the step before. The program is the same, and so are the bits.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._errors import NonFiniteError, explain
from .._model.state import TrainState, copied
from .._strategy.jit import strategy_jit
from .._strategy.metrics import SKIPPED
from .._strategy.rollout_strategy import RolloutStrategy
from .._task.mesh import keep_replicated, on_one_device, replicated
from .._task.task import Task, label_ranges
from .chunk import Job, Report, key_of_step, train_chunk
from .dispatch import Chunk

# So many skipped steps in a row are no accident: nothing more will be learnt.
MOST_SKIPS = 100

# A loss that has become so many times what it was diverges.
_GROWN = 10


class Watch:
    """Looks at the chunks of a run, in order. `skipped` counts the steps not taken so far,
    `in_a_row` those of them that are the last ones."""

    def __init__(self, state: TrainState, skipped: int = 0, in_a_row: int = 0):
        leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(state, eqx.is_inexact_array))
        self._names = [jax.tree_util.keystr(path).lstrip(".") for path, _ in leaves]
        # What was not finite to begin with, such as a mask of -inf, is meant to be so. On the
        # host: what is done once is not worth a program.
        arrays = jax.device_get([leaf for _, leaf in leaves])
        self._meant = [np.array([np.sum(~np.isfinite(x)), np.sum(np.isnan(x))]) for x in arrays]
        self.skipped = skipped
        self.in_a_row = in_a_row
        self._losses = np.zeros(0)  # of the first step and the last one that were looked at

    def look(
        self, chunk: Chunk, report: Report, rows: dict[str, np.ndarray]
    ) -> NonFiniteError | None:
        """The error of a chunk that went wrong, whose `state` is the one to go back to. The chunk's
        `report`, and the metrics `rows` of the steps that were taken, are on the host."""
        start, stop, job, before = chunk.start, chunk.stop, chunk.job, chunk.before
        losses = np.concatenate([self._losses, rows.get("loss", ())])
        self._losses = losses[[0, -1]] if losses.size else losses
        if job.skip:
            step = self._count(start, rows[SKIPPED])
            return None if step is None else _too_many(chunk, rows, step)
        first = first_bad(rows)
        if first is None and self._first_nonfinite_leaf(report) is None:
            return None
        if first is not None:
            losses = losses[: len(losses) - (stop - start) + first[0] + 1]
        # The last step whose metrics are finite. The state after it need not be.
        end = stop if first is None else start + first[0]
        state, again = _replay(job, before, end)
        leaf = self._first_nonfinite_leaf(again)
        if leaf is not None:
            return self._bisect(job, before, start, end, leaf, losses)
        if first is None:  # a device that does not compute the same twice
            return _state_error(job, state, stop, self._first_nonfinite_leaf(report) or "", losses)
        row, name = first
        message = f"The metric {name!r} is not finite at step {end + 1}."
        parts = message, str(float(rows[name][row])), "finite metrics"
        return _error(job, state, end + 1, name, losses, parts)

    def _count(self, start: int, skipped: np.ndarray) -> int | None:
        """The step that was the one too many of a row of skips, if there was."""
        for row in range(len(skipped)):
            self.in_a_row = self.in_a_row + 1 if skipped[row] else 0
            self.skipped += int(skipped[row])
            if self.in_a_row == MOST_SKIPS:
                self.in_a_row = 0  # whoever goes on from here has heard of these
                return start + row + 1
        return None

    def _first_nonfinite_leaf(self, report: Report) -> str | None:
        """The first array of the state with more that is not finite, or NaN, than when the run
        began."""
        for name, meant, now in zip(self._names, self._meant, report.non_finite, strict=True):
            if (now > meant).any():
                return name
        return None

    def _bisect(
        self,
        job: Job,
        state: TrainState,
        low: int,
        high: int,
        name: str,
        losses: np.ndarray,
    ) -> NonFiniteError:
        """By halves: `state`, that after step `low`, is sound; `name` is not after step `high`."""
        before = state
        while high - low > 1:
            middle = (low + high) // 2
            new, report = _replay(job, before, middle)
            leaf = self._first_nonfinite_leaf(report)
            if leaf is None:
                low, state = middle, new
            else:
                high, name = middle, leaf
        return _state_error(job, state, high, name, losses)


def first_bad(rows: dict[str, np.ndarray]) -> tuple[int, str] | None:
    """The first row of the metrics with a value that is not finite, and the name of one."""
    bad = {name: np.flatnonzero(~np.isfinite(values)) for name, values in rows.items()}
    return min(((int(i[0]), name) for name, i in bad.items() if len(i)), default=None)


def _replay(job: Job, before: TrainState, stop: int) -> tuple[TrainState, Report]:
    """The state after step `stop` of the chunk, from `before`, which stays."""
    until = dataclasses.replace(job, stop=replicated(jnp.int32(stop), job.mesh))
    state, report = train_chunk(until, replicated(copied(before), job.mesh))
    return on_one_device(state, job.mesh), jax.device_get(report)


@strategy_jit()
def _tasks_of(job: Job, step: Int[Array, ""]) -> Task:
    """The tasks of outer step `step` (1 is the first)."""
    others = job.source.first(job.root)  # of the same shapes and dtypes, keys among them

    def body(index: Any, tasks: Task, key: Any, carry: Task) -> Task:
        return tasks

    found = job.source.for_each_step(job.start, step, key_of_step(job.root), body, others)
    return keep_replicated(found, job.mesh)


def _state_error(
    job: Job, state: TrainState, step: int, name: str, losses: np.ndarray
) -> NonFiniteError:
    message = f"The state's `{name}` is not finite after step {step}."
    expected = "finite parameters and a finite optimizer state"
    return _error(job, state, step, name, losses, (message, "NaN or infinity", expected))


def _too_many(chunk: Chunk, rows: dict[str, np.ndarray], step: int) -> NonFiniteError:
    row, job = step - chunk.start - 1, chunk.job
    state, _ = _replay(job, chunk.before, step)
    _, name = first_bad({name: values[row : row + 1] for name, values in rows.items()}) or (0, "")
    losses = rows.get("loss", np.zeros(0))[: row + 1]
    what = f"{name!r} = {float(rows[name][row])}" if name else "a state that was not finite"
    message = f"{MOST_SKIPS} outer steps in a row were skipped, the last of them step {step}."
    parts = message, f"{what} at step {step}", f"fewer than {MOST_SKIPS} in a row"
    return _error(job, state, step, name, losses, parts)


def _error(
    job: Job,
    state: TrainState,
    step: int,
    name: str,
    losses: np.ndarray,
    parts: tuple[str, str, str],
) -> NonFiniteError:
    """Says as well what may explain it and what may help, where a reason has been seen: in the
    tasks of that step, in the state before it, or in the losses until then."""
    message, received, expected = parts
    tasks = on_one_device(_tasks_of(job, replicated(jnp.int32(step), job.mesh)), job.mesh)
    if bad := _not_finite(tasks):
        received += f". The data of that step is not finite: {', '.join(bad)}"
        expected += ". So must the data be, before anything else helps"
    else:
        ranges = label_ranges(tasks, "tasks", ndim=2)
        labels = f"; labels must be in range(classes), and are {ranges}" if ranges else ""
        received += f". The data of that step is finite{labels}"
        expected += _remedy(job, state, name, losses)
    text = explain(message, received, expected)
    return NonFiniteError(text, step=step, name=name, state=state)


def _remedy(job: Job, state: TrainState, name: str, losses: np.ndarray) -> str:
    leaves = jax.tree.leaves(state.model)
    if any(eqx.is_array(x) and x.dtype == jnp.float16 for x in leaves):
        return (
            ". In float16 numbers below 6e-8 are zero, an optimizer's usual `eps=1e-8` among them, "
            "and those above 65,504 infinite: `optax.adam(..., eps=1e-4)`, or a model in bfloat16, "
            "which has the range of float32"
        )
    known = losses[np.isfinite(losses)]
    if known.size and known[-1] > _GROWN * abs(known[0]):
        return (
            f". The loss had grown from {known[0]:.3g} to {known[-1]:.3g}: a smaller learning rate "
            "or gradient clipping may help"
        )
    differentiated = isinstance(job.strategy, RolloutStrategy)
    if differentiated and name == "grad_norm" and losses.size and np.isfinite(losses[-1]):
        return ". The loss is finite: `eqxmeta.check_meta_gradient` tells whether its gradient is"
    return ""


def _not_finite(tasks: Task) -> list[str]:
    return [
        f"`tasks{jax.tree_util.keystr(path)}`"
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(tasks))
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all()
    ]
