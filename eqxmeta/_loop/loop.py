"""The loop of a run: dispatches chunks of outer steps, and a chunk behind calls the hooks."""

import time
from collections.abc import Collection

import jax
import numpy as np

from .._callback.callback import Callback
from .._callback.run import Origin, Run, Settings
from .._model.state import TrainState
from .._task.source import Source
from .dispatch import Chunk, Dispatcher
from .hooks import Hooks
from .non_finite import Watch
from .pace import Pace, next_stop
from .signals import on_interrupt, on_termination

INTERRUPTED = "interrupted"
TERMINATED = "terminated"


class Loop:
    """One run. `run` is what the callbacks see of it; `termination` knows whether the process is
    to end. `metrics`: the names of the training metrics."""

    def __init__(
        self,
        settings: Settings,
        origin: Origin,
        source: Source,
        callbacks: tuple[Callback, ...],
        metrics: Collection[str],
    ):
        self._settings = settings
        self._hooks = Hooks(callbacks, settings.everys, metrics)
        self._device = Dispatcher(settings, source, origin.state)
        self.run = Run(
            settings,
            origin,
            state_after=self._device.state_after,
            publish=lambda scalars: self._hooks.log(self.run, scalars),
            callback_states=self._hooks.states,
        )
        self._watch = Watch(origin.state, self.run.skipped, self.run.skipped_in_a_row)
        self._pace = Pace(settings.steps_per_execution, source.capacity)
        self._ready = 0.0  # when the newest metrics came
        self._interrupted = False
        self.termination = on_termination(lambda: self.run.request_stop(TERMINATED))

    def refuse(self) -> None:
        """Before `train`, and not part of what is reported to callbacks: whoever is refused has
        nothing to put in order."""
        self._hooks.refuse(self.run)

    def train(self) -> TrainState:
        # Not before: a run that is refused leaves the callbacks as they were.
        self._hooks.load_states(self.run.resumed_meta.get("callbacks", {}))
        try:
            with on_interrupt(self._interrupt), self.termination:
                return self._train_with_hooks()
        except BaseException as error:
            self.termination.pass_on(error)
            raise

    def _train_with_hooks(self) -> TrainState:
        try:
            try:
                self._hooks.begin(self.run)
                self._train()
            except KeyboardInterrupt:
                # From a hook. The state is whole, so that this ends the run like Ctrl-C does.
                if self._interrupted:
                    raise
                self._interrupt()
            # The chunk in flight is dropped, if the run has been asked to end before it.
            state = self._device.rewind(self.run.step)
            self._hooks.end(self.run)
        except BaseException as error:
            self._hooks.exception(self.run, error)
            raise
        return state

    def _interrupt(self) -> None:
        self._interrupted = True
        self.run.request_stop(INTERRUPTED)

    def _train(self) -> None:
        run, device = self.run, self._device
        if device.ahead < run.steps and run.stop_reason is None:
            # No step at all: compiles, so that the pace is not misled.
            jax.block_until_ready(device.dispatch(device.ahead).report)
        # The device is a chunk ahead of the hooks, also of those that save and evaluate: what they
        # do costs no time unless it takes longer than a chunk.
        pending = None
        while run.stop_reason is None and (pending or device.ahead < run.steps):
            before, pending = pending, None
            if device.ahead < run.steps:
                try:
                    pending = device.dispatch(self._next_stop())
                except Exception:
                    self._complete(before)  # the steps before the error were taken, and are told
                    if run.stop_reason is None:  # else what failed is not needed
                        raise
                    break
            self._complete(before)
            if run.step < run.steps and time.monotonic() > self._settings.deadline:
                run.request_stop("time limit")

    def _next_stop(self) -> int:
        """Where the next chunk ends."""
        ahead = self._device.ahead
        stop = next_stop(ahead, self.run.steps, self._settings.everys.values())
        return min(stop, ahead + self._pace.limit)

    def _complete(self, chunk: Chunk | None) -> None:
        """Wait for a chunk, tell of its steps, and call whoever needs the host after them."""
        if chunk is None:
            return
        self._receive(chunk)
        if self.run.step == chunk.stop:  # else it went wrong before
            self._hooks.step_end(self.run)

    def _receive(self, chunk: Chunk) -> None:
        start, stop = chunk.start, chunk.stop
        report = jax.device_get(chunk.report)
        ready = time.monotonic()
        self._pace.measured(stop - start, ready - max(chunk.began, self._ready))
        self._ready = ready
        rows = report.metrics.rows(stop - start)
        error = self._watch.look(chunk, report, rows)
        self.run.skipped = self._watch.skipped
        self.run.skipped_in_a_row = self._watch.in_a_row
        good = stop
        if error is not None:
            good = int(error.state.step)
            self._device.fall_back(error.state)
            if self._settings.on_non_finite == "stop":
                self.run.request_stop(str(error).splitlines()[0].rstrip("."))
                error = None
        try:
            # A curve that ends a chunk before the trouble would not show it.
            if good > start:
                self.run.step = good
                rows = {name: values[: good - start] for name, values in rows.items()}
                self._hooks.notify_rows(self.run, {"step": np.arange(start + 1, good + 1), **rows})
        finally:
            if error is not None:
                raise error
