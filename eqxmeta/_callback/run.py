"""What a callback sees of a run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._model.state import TrainState
    from .._strategy.strategy import Strategy
    from .published import Published


class Run:
    """What a callback sees of a run: a small view, not the trainer.

    - `step`: outer steps taken so far, a host integer.
    - `steps`: the step at which the run ends, if nothing ends it before.
    - `start`: the step at which this call of `fit` began; 0 unless resumed.
    - `resuming`: whether `fit` was asked to resume. Files of an earlier attempt are then
      continued, from `start`; otherwise they belong to somebody else.
    - `resumed_from`: the checkpoint from which it goes on, if there was one.
    - `skipped_in_a_row`: how many of the `skipped` steps are the last ones.
    - `skipped`: outer steps not taken so far, of `Trainer(on_non_finite="skip")`.
    - `id`: tells this call of `fit` from all others.
    - `cadence`: the largest `every` of the callbacks; `None` if there is none.
    - `strategy`: the strategy that is being trained.
    - `config`: plain values that describe the run (seed, meta-batch size, parameter count, ...).
    - `state`: the `TrainState` after `step` steps. It is the callback's to keep, since the
      loop goes on with buffers of its own; but not to donate: all callbacks share the copy.
    """

    def __init__(
        self,
        *,
        strategy: Strategy,
        steps: int,
        start: int,
        resuming: bool,
        config: Mapping[str, Any],
        snapshot: Callable[[], TrainState],
        publish: Callable[[Mapping[str, Published]], None],
        callback_states: Callable[[], dict[str, dict[str, Any]]],
        resumed_from: Path | None = None,
        cadence: int | None = None,
    ):
        self.id = secrets.token_hex(8)
        self.strategy = strategy
        self.step = start
        self.steps = steps
        self.start = start
        self.resuming = resuming
        self.resumed_from = resumed_from
        self.config = dict(config)
        self.cadence = cadence
        self.stop_reason: str | None = None
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._snapshot = snapshot
        self._publish = publish
        self._callback_states = callback_states

    @property
    def state(self) -> TrainState:
        return self._snapshot()

    def log(self, scalars: Mapping[str, Published]) -> None:
        """Log values at the current step: every callback's `on_log` receives them.
        Not under the name of a training metric, "step" or "skipped" (`ValueError`)."""
        self._publish(scalars)

    def request_stop(self, reason: str) -> None:
        """End the run after this step; the first reason is the one that is told."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def callback_states(self) -> dict[str, dict[str, Any]]:
        """`state_dict()` of every callback, by name: what a checkpoint holds beside the state."""
        return self._callback_states()
