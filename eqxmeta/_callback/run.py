"""A run: what it was asked for, where it begins, and what a callback sees of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.sharding import Mesh

    from .._model.state import TrainState
    from .._strategy.strategy import Strategy
    from .published import Published

# The reason of `request_stop` after SIGTERM.
TERMINATED = "terminated"

OnNonFinite: TypeAlias = Literal["raise", "skip", "stop"]


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    - `steps`: the step at which it ends, if nothing ends it before.
    - `everys`: by the name of a callback, how many outer steps are between its `on_step_end`s.
    - `max_time`: how many seconds it may take, compiling apart.
    - `steps_per_execution`, `on_non_finite`: see `Trainer`.
    - `config`: plain values that describe the run.
    - `mesh`: the devices that share the tasks of a step; `None`: a single one.
    """

    strategy: Strategy
    steps: int
    seed: int
    everys: Mapping[str, int]
    max_time: float
    steps_per_execution: int | Literal["auto"]
    on_non_finite: OnNonFinite
    config: Mapping[str, Any]
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Origin:
    """Where a run begins: its first state, and the checkpoint that this is from, if there is one.

    - `resuming`: whether `fit` was asked to resume.
    - `path`, `meta`: the checkpoint and its `meta`; `None` and empty if there is none.
    """

    state: TrainState
    resuming: bool = False
    path: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """What a callback sees of a run: a small view, not the trainer.

    - `step`: outer steps taken so far, a host integer.
    - `steps`: the step at which the run ends, if nothing ends it before.
    - `start`: the step at which this call of `fit` began; 0 unless resumed.
    - `resuming`: whether `fit` was asked to resume. Files of an earlier attempt are then
      continued, from `start`; otherwise they belong to somebody else.
    - `resumed_from`: the checkpoint from which it goes on, if there was one.
    - `resumed_meta`: the `meta` of that checkpoint; empty if there was none.
    - `requests`: the reasons for which this process has asked it to end.
    - `skipped_in_a_row`: how many of the `skipped` steps are the last ones.
    - `skipped`: outer steps not taken so far, of `Trainer(on_non_finite="skip")`.
    - `id`: tells this call of `fit` from all others.
    - `ended`: whether the last step of this call has been taken. What is logged from then on is
      there only because the run ends here: logs mark it, and a run that is resumed drops it.
    - `terminated`: whether the process is to end (SIGTERM): there is time to save, and for no more.
    - `cadence`: the largest `every` of the callbacks; `None` if there is none.
    - `strategy`: the strategy that is being trained.
    - `mesh`: the `jax.sharding.Mesh` of its devices; `None` if there is one.
    - `config`: plain values that describe the run (seed, meta-batch size, parameter count, ...).
    - `examples`: how many examples, support and query, an outer step sees; 0 if that is not known.
    - `state`: the `TrainState` after `step` steps. It is the callback's to keep, since the
      loop goes on with buffers of its own; but not to donate: all callbacks share the copy.
    - `activity`: what is done that may take its time, since when (`time.monotonic()`), and whether
      to tell of it where no bar shows it.
    - `show`: to be assigned by a callback that can show it: called with a text, such as "compiling
      0:12", every now and then, and with `None` when that has ended. On another thread.
    """

    def __init__(
        self,
        settings: Settings,
        origin: Origin,
        *,
        state_after: Callable[[int], TrainState],
        publish: Callable[[Mapping[str, Published]], None],
        callback_states: Callable[[], dict[str, dict[str, Any]]],
        sync_callbacks: Callable[[], None],
        alone: bool = True,
    ):
        self.id = secrets.token_hex(8)
        self.strategy = settings.strategy
        self.mesh = settings.mesh
        self.steps = settings.steps
        self.config = dict(settings.config)
        self.cadence = max(settings.everys.values(), default=None)
        self.start = self.step = int(origin.state.step)
        self.resuming = origin.resuming
        self.resumed_from = origin.path
        self.resumed_meta = origin.meta
        self.skipped: int = origin.meta.get("skipped", 0)
        self.skipped_in_a_row: int = origin.meta.get("skipped_in_a_row", 0)
        self.examples = 0
        self.stop_reason: str | None = None
        self.requests: list[str] = []
        self.ended = False
        self.terminated = False
        self.activity: tuple[str, float, bool] | None = None
        self.show: Callable[[str | None], None] | None = None
        self._alone = alone
        self._state_after = state_after
        self._publish = publish
        self._callback_states = callback_states
        self._sync_callbacks = sync_callbacks

    @property
    def state(self) -> TrainState:
        return self._state_after(self.step)

    def log(self, scalars: Mapping[str, Published]) -> None:
        """Log values at the current step: every callback's `on_log` receives them.
        Not under the name of a training metric, "step" or "skipped" (`ValueError`)."""
        self._publish(scalars)

    def request_stop(self, reason: str) -> None:
        """End the run after this step; the first reason is the one that is told. With several
        processes all end, at the first step on which they can agree."""
        self.requests.append(reason)
        if self._alone:
            self.stop(self.requests)

    def stop(self, reasons: Sequence[str]) -> None:
        """The run ends here, for these reasons."""
        self.terminated = self.terminated or TERMINATED in reasons
        if self.stop_reason is None:
            self.stop_reason = reasons[0]

    @contextmanager
    def doing(self, activity: str, *, tell: bool = True) -> Iterator[None]:
        """What the block does may take its time: this is what the user is told that it is. `tell`:
        also by a line, now and then, where no bar shows it."""
        before, self.activity = self.activity, (activity, time.monotonic(), tell)
        try:
            yield
        finally:
            self.activity = before

    def callback_states(self) -> dict[str, dict[str, Any]]:
        """`state_dict()` of every callback, by name: what a checkpoint holds beside the state."""
        return self._callback_states()

    def sync_callbacks(self) -> None:
        """`sync_files()` of every callback: what a checkpoint says is in its files, is there."""
        self._sync_callbacks()
