"""The state of a run on the device, and the dispatches that consume it."""

import contextlib
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._callback.run import Settings
from .._errors import explain
from .._model.state import TrainState, copied
from .._task.mesh import on_one_device, replicated
from .._task.processes import Processes
from .._task.source import Source
from .chunk import Job, Report, train_chunk


class Chunk(NamedTuple):
    """A dispatch of outer steps `start` to `stop`, the state before it, and when it was made."""

    start: int
    stop: int
    job: Job
    before: TrainState
    report: Report
    began: float


class Dispatcher:
    """Dispatches chunks of outer steps. Each consumes the state, of which a copy from before it
    stays: for the hooks, which are called a chunk later, and for a step that goes wrong.

    `ahead`: outer steps dispatched so far. The host may have seen fewer.
    """

    def __init__(self, settings: Settings, source: Source, state: TrainState, processes: Processes):
        self.ahead = int(state.step)
        self._processes = processes
        self._settings = settings
        self._source = source
        self._mesh = settings.mesh
        self._root = replicated(jax.random.key(settings.seed), self._mesh)
        self._state = self._placed(state)
        self._copies: dict[int, TrainState] = {}  # by step

    def dispatch(self, stop: int) -> Chunk:
        """Take the outer steps up to `stop`."""
        source = self._source.take(stop - self.ahead)
        self._processes.agree()  # it may have failed in one of them
        start, before = self.ahead, self.state_after(self.ahead)
        self.ahead, self._copies = stop, {start: before}
        skip = self._settings.on_non_finite == "skip"
        strategy = self._settings.strategy
        first, last = replicated((jnp.int32(start), jnp.int32(stop)), self._mesh)
        job = Job(strategy, source, self._root, first, last, skip, self._mesh)
        began = time.monotonic()
        self._state, report = train_chunk(job, self._state)
        return Chunk(start, stop, job, before, report, began)

    def state_after(self, step: int) -> TrainState:
        """The state after `step` steps: one copy a step, however many callbacks ask."""
        if step not in self._copies:
            if step != self.ahead:
                message = "`run.state` is gone."
                received = f"a request for step {step} while step {self.ahead} is computed"
                expected = "a request in another hook than `on_exception`"
                raise RuntimeError(explain(message, received, expected))
            self._copies[step] = copied(on_one_device(self._state, self._mesh))
        return self._copies[step]

    def fall_back(self, state: TrainState) -> None:
        """What comes after `state` went wrong."""
        self._copies = {int(state.step): state}

    def rewind(self, step: int) -> TrainState:
        """The state after `step` steps, from which a next dispatch would go on."""
        if self.ahead != step:
            self._state, self.ahead = self._placed(self.state_after(step)), step
        return on_one_device(self._state, self._mesh)

    def settle(self) -> None:
        """Wait for what has been dispatched, whatever becomes of it: the interpreter does not end
        well while that computes."""
        with contextlib.suppress(Exception):
            jax.block_until_ready(eqx.filter(self._state, eqx.is_array))

    def _placed(self, state: TrainState) -> TrainState:
        """A copy that a dispatch may consume, on every device."""
        return replicated(copied(state), self._mesh)
