"""The loop of one run: dispatches chunks of outer steps and calls the hooks."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from .._callback.callback import Callback, name_of
from .._callback.published import Published, check_logged
from .._callback.run import Run
from .._checkpoint.save_load import read_manifest
from .._errors import explain
from .._model.state import TrainState, copied
from .._strategy.metrics import SKIPPED
from .._strategy.strategy import Strategy
from .._task.device_source import Loaded, Sampled
from .chunk import Job, Report, train_chunk
from .non_finite import OnNonFinite, Watch
from .pace import Pace, next_stop
from .signals import on_interrupt, on_termination

INTERRUPTED = "interrupted"
TERMINATED = "terminated"


class Chunk(NamedTuple):
    """A dispatch of outer steps `start` to `stop`, the state before it, and when it was made."""

    start: int
    stop: int
    job: Job
    before: TrainState
    report: Report
    began: float


class Loop:
    """One run: dispatches chunks, and a chunk behind reads their metrics and calls the hooks.

    `view` is what the callbacks see of it; `termination` knows whether the process is to end.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: TrainState,
        *,
        source: Callable[[int], Sampled | Loaded],
        root: PRNGKeyArray,
        pace: Pace,
        callbacks: tuple[Callback, ...],
        everys: Mapping[str, int],
        deadline: float,
        on_non_finite: OnNonFinite,
        steps: int,
        config: Mapping[str, Any],
        resuming: bool,
        resumed_from: Path | None,
    ):
        self.view = Run(
            strategy=strategy,
            steps=steps,
            start=int(state.step),
            config=config,
            resuming=resuming,
            resumed_from=resumed_from,
            snapshot=self._copy_state,
            publish=self._publish,
            callback_states=self._callback_states,
            cadence=max(everys.values(), default=None),
        )
        self._strategy = strategy
        self._state = copied(state)  # the loop consumes its state; this one is the user's
        self._source = source
        self._root = root
        self._pace = pace
        self._callbacks = callbacks
        self._everys = everys
        self._deadline = deadline
        self._on_non_finite = on_non_finite
        saved = {} if resumed_from is None else read_manifest(resumed_from)["meta"]
        self._watch = Watch(state, saved.get("skipped", 0), saved.get("skipped_in_a_row", 0))
        self.view.skipped = self._watch.skipped
        # Steps dispatched; `view.step` counts those whose metrics have been seen.
        self._ahead = self.view.start
        self._pending: Chunk | None = None
        self._ready = 0.0
        self._copies: dict[int, TrainState] = {}  # by step
        self._interrupted = False
        self.termination = on_termination(lambda: self.view.request_stop(TERMINATED))
        self._begun: list[Callback] = []  # whose `on_fit_start` was called
        self._held_back: list[Mapping[str, Published]] | None = None
        self._reserved = {"step", SKIPPED}  # and the names of the metrics, once they are known

    def refuse(self) -> None:
        """Before `run`, and not part of what is reported to callbacks: whoever is refused has
        nothing to put in order."""
        for callback in self._callbacks:
            callback.refuse(self.view)

    def run(self) -> TrainState:
        with on_interrupt(self._interrupt), self.termination:
            try:
                try:
                    self._begin()
                    self._train()
                except KeyboardInterrupt:
                    # From a hook. The state is whole, so that this ends the run like Ctrl-C does.
                    if self._interrupted:
                        raise
                    self._interrupt()
                self._rewind()
                self._end()
            except BaseException as error:
                self._report(error)
                raise
        return self._state

    def _interrupt(self) -> None:
        self._interrupted = True
        self.view.request_stop(INTERRUPTED)

    def _copy_state(self) -> TrainState:
        """The state after `view.step` steps: one copy a step, however many callbacks ask."""
        step = self.view.step
        if step not in self._copies:
            if step != self._ahead:
                raise RuntimeError(
                    explain(
                        "`run.state` is gone.",
                        f"a request for step {step} while step {self._ahead} is computed",
                        "a request in another hook than `on_exception`",
                    )
                )
            self._copies[step] = copied(self._state)
        return self._copies[step]

    def _publish(self, scalars: Mapping[str, Published]) -> None:
        check_logged(scalars, self._reserved)
        if self._held_back is not None:
            self._held_back.append(scalars)
            return
        for callback in self._callbacks:
            callback.on_log(self.view, scalars)

    def _callback_states(self) -> dict[str, dict[str, Any]]:
        return {name_of(callback): callback.state_dict() for callback in self._callbacks}

    def _train(self) -> None:
        run = self.view
        if self._ahead < run.steps and run.stop_reason is None:
            self._dispatch(self._ahead)  # no step at all: compiles, so that the pace is not misled
            jax.block_until_ready(self._state)
            self._pending = None
        # The device is a chunk ahead of the hooks, also of those that save and evaluate: what they
        # do costs no time unless it takes longer than a chunk.
        while run.stop_reason is None and (self._pending or self._ahead < run.steps):
            before, self._pending = self._pending, None
            if self._ahead < run.steps:
                stop = next_stop(self._ahead, run.steps, self._everys.values())
                try:
                    self._dispatch(min(stop, self._ahead + self._pace.limit))
                except Exception:
                    self._finish(before)  # the steps before the error were taken, and are told
                    if run.stop_reason is None:  # else what failed is not needed
                        raise
                    break
            self._finish(before)
            if run.step < run.steps and time.monotonic() > self._deadline:
                run.request_stop("time limit")

    def _rewind(self) -> None:
        """Drop the chunk in flight, if the run has been asked to end before it."""
        if self._ahead != self.view.step:
            self._state = self._copy_state()
            self._ahead, self._pending = self.view.step, None

    def _finish(self, chunk: Chunk | None) -> None:
        """Wait for a chunk, tell of its steps, and call whoever needs the host after them."""
        if chunk is None:
            return
        self._deliver(chunk)
        if self.view.step != chunk.stop:  # it went wrong before
            return
        for callback in self._callbacks:
            every = self._everys.get(name_of(callback))
            if every is not None and chunk.stop % every == 0:
                callback.on_step_end(self.view)

    def _dispatch(self, stop: int) -> None:
        source = self._source(stop - self._ahead)
        start, self._ahead = self._ahead, stop
        # The hooks of the last chunk run while this one consumes the state that they may ask for.
        self._copies = {start: self._copies.get(start) or copied(self._state)}
        skip = self._on_non_finite == "skip"
        job = Job(self._strategy, source, self._root, jnp.int32(start), jnp.int32(stop), skip)
        began = time.monotonic()
        self._state, report = train_chunk(job, self._state)
        self._reserved.update(*report.metrics.names)
        self._pending = Chunk(start, stop, job, self._copies[start], report, began)

    def _deliver(self, chunk: Chunk) -> None:
        start, stop, began = chunk.start, chunk.stop, chunk.began
        report = jax.device_get(chunk.report)
        ready = time.monotonic()
        self._pace.measured(stop - start, ready - max(began, self._ready))
        self._ready = ready
        metrics = {name: rows[: stop - start] for name, rows in report.metrics.unpacked().items()}
        error = self._watch.look(chunk.job, chunk.before, report, metrics)
        self.view.skipped = self._watch.skipped
        self.view.skipped_in_a_row = self._watch.in_a_row
        good = stop
        if error is not None:
            good = int(error.state.step)
            self._copies = {good: error.state}
            if self._on_non_finite == "stop":
                self.view.request_stop(str(error).splitlines()[0].rstrip("."))
                error = None
        try:
            # A curve that ends a chunk before the trouble would not show it.
            if good > start:
                self._tell(start, good, metrics)
        finally:
            if error is not None:
                raise error

    def _tell(self, start: int, stop: int, metrics: Mapping[str, np.ndarray]) -> None:
        self.view.step = stop
        rows = {name: values[: stop - start] for name, values in metrics.items()}
        rows = {"step": np.arange(start + 1, stop + 1), **rows}
        interrupt, self._held_back = None, []
        try:
            for callback in self._callbacks:
                try:
                    callback.on_chunk_end(self.view, rows)
                except KeyboardInterrupt as error:  # the other callbacks must not miss these rows
                    interrupt = error
        finally:
            # What one logs at this step reaches the others after the rows up to this step.
            published, self._held_back = self._held_back, None
        for scalars in published:
            self._publish(scalars)
        if interrupt is not None:
            raise interrupt

    def _begin(self) -> None:
        interrupt = None
        for callback in self._callbacks:
            self._begun.append(callback)
            try:
                callback.on_fit_start(self.view)
            except KeyboardInterrupt as error:  # the end is told to the others, so the start is too
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _end(self) -> None:
        """Every callback hears of the end, for `Checkpoint` is the last; then the first error is
        raised."""
        first = None
        for callback in self._callbacks:
            try:
                callback.on_fit_end(self.view)
            except Exception as error:
                if first is None:
                    first = error
                else:
                    first.add_note(f"{name_of(callback)}.on_fit_end failed as well: {error!r}")
        if first is not None:
            raise first

    def _report(self, error: BaseException) -> None:
        """Every callback that has begun hears of the error; one that fails over it, or is
        interrupted, does not silence the rest."""
        interrupt = None
        for callback in self._begun:
            try:
                callback.on_exception(self.view, error)
            except BaseException as second:
                error.add_note(f"{name_of(callback)}.on_exception failed as well: {second!r}")
                if not isinstance(second, Exception):
                    interrupt = second
        if interrupt is not None:
            raise interrupt from error
