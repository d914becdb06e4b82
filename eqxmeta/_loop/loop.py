"""The loop of a run: dispatches chunks of outer steps, and a chunk behind calls the hooks."""

import math
import time
from collections.abc import Collection

import jax
import numpy as np

from .._callback.callback import Callback
from .._callback.run import TERMINATED, Origin, Run, Settings
from .._model.state import TrainState
from .._task.processes import Processes
from .._task.source import Source
from .._task.task import count_all_examples
from .dispatch import Chunk, Dispatcher
from .hooks import Hooks
from .non_finite import Watch
from .pace import Pace, next_stop
from .signals import INTERRUPTED, Signals

# For so long the tasks of a whole chunk are waited for, before those that are there are taken.
_SOURCE_SECONDS = 0.25

# What one process can tell the others of why it wants to end.
_TIME_LIMIT, _ANOTHER = "time limit", "as another process asked"
_REASONS = (TERMINATED, INTERRUPTED, _TIME_LIMIT, _ANOTHER)


class Loop:
    """One run. `run` is what the callbacks see of it. `metrics`: the names of the training metrics;
    `signals`: those that may end it, once `train` is called; `processes`: those that run it."""

    def __init__(
        self,
        settings: Settings,
        origin: Origin,
        source: Source,
        callbacks: tuple[Callback, ...],
        metrics: Collection[str],
        signals: Signals,
        processes: Processes,
    ):
        self._settings = settings
        self._processes = processes
        self._signals = signals
        self._source = source
        self._hooks = Hooks(callbacks, settings.everys, metrics, signals)
        self._device = Dispatcher(settings, source, origin.state, processes)
        self.run = Run(
            settings,
            origin,
            state_after=self._device.state_after,
            publish=lambda scalars: self._hooks.log(self.run, scalars),
            callback_states=self._hooks.states,
            sync_callbacks=self._hooks.sync,
            alone=not processes.several,
        )
        self.run.examples = count_all_examples(source.example)
        self._watch = Watch(origin.state, self.run.skipped, self.run.skipped_in_a_row)
        self._pace = Pace(settings.steps_per_execution, source.capacity)
        self._ready = 0.0  # when the newest metrics came
        self._interrupted = False
        self._deadline = math.inf

    def refuse(self) -> None:
        """Before `train`, and not part of what is reported to callbacks: whoever is refused has
        nothing to put in order."""
        self._hooks.refuse(self.run)

    def train(self) -> TrainState:
        # Not before: a run that is refused leaves the callbacks as they were.
        self._hooks.load_states(self.run.resumed_meta.get("callbacks", {}))
        signals = self._signals
        signals.stop, signals.show = self._stop, lambda: self.run.show
        signals.activity = lambda: self.run.activity
        try:
            self._begin()
            try:
                self._train()
            except KeyboardInterrupt:
                # From a hook. The state is whole, so that this ends the run like Ctrl-C does.
                if self._interrupted or self._processes.several:
                    raise
                self._stop(INTERRUPTED)
            # The chunk in flight is dropped, if the run has been asked to end before it.
            state = self._device.rewind(self.run.step)
            self._hooks.end(self.run)
        except BaseException as error:
            self._hooks.exception(self.run, error)
            if self._processes.several and isinstance(error, Exception):
                self._device.settle()
            raise
        return state

    def _stop(self, reason: str) -> None:
        self._interrupted |= reason == INTERRUPTED
        self.run.request_stop(reason)

    def _begin(self) -> None:
        """All that comes before the first step."""
        run, device = self.run, self._device
        self._hooks.begin(run)
        self._signals.end_if_nothing_has_begun()
        if device.ahead < run.steps and run.stop_reason is None:
            # No step at all: compiles, so that neither the pace nor the clock is misled.
            with run.doing("compiling"):
                jax.block_until_ready(device.dispatch(device.ahead).report)
        self._signals.begin()
        self._deadline = time.monotonic() + self._settings.max_time

    def _train(self) -> None:
        run, device = self.run, self._device
        # The device is a chunk ahead of the hooks, also of those that save and evaluate: what they
        # do costs no time unless it takes longer than a chunk.
        pending = None
        while not self._is_to_end() and (pending or device.ahead < run.steps):
            before, pending = pending, None
            stop = self._processes.agree(self._next_stop(wait=before is None))
            if stop > device.ahead:
                try:
                    pending = device.dispatch(stop)
                except Exception:
                    if self._processes.several:  # whose hooks may wait for the others
                        raise
                    self._complete(before)  # the steps before the error were taken, and are told
                    if run.stop_reason is None:  # else what failed is not needed
                        raise
                    break
            self._complete(before)
            if before:
                self._stop_if_late()

    def _is_to_end(self) -> bool:
        run = self.run
        if self._processes.several and run.stop_reason is None:
            mine = run.requests[:1]
            codes = [_REASONS.index(x if x in _REASONS else _ANOTHER) for x in mine]
            code = self._processes.agree(*codes or [len(_REASONS)])
            if code < len(_REASONS):
                run.stop(mine if codes == [code] else [_REASONS[code]])
        return run.stop_reason is not None

    def _stop_if_late(self) -> None:
        if self.run.step < self.run.steps and time.monotonic() > self._deadline:
            self.run.request_stop(_TIME_LIMIT)

    def _next_stop(self, *, wait: bool) -> int:
        """Where the next chunk ends. If the source has no tasks for it yet that is where the last
        one ended; with `wait`, only if the run is to end before there are any."""
        run, ahead = self.run, self._device.ahead
        stop = next_stop(ahead, run.steps, self._settings.everys.values())
        wanted = min(stop, ahead + self._pace.limit) - ahead
        there = self._source.available(wanted, 0.0)
        if there == wanted or not wait:
            return ahead + there if there == wanted else ahead
        with run.doing(f"waiting for `tasks[{ahead + there}]`"):
            while not run.requests:
                there = self._source.available(wanted, _SOURCE_SECONDS)
                if there:
                    return ahead + there
                self._stop_if_late()
        return ahead

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
