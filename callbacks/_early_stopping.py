"""A callback that ends a run which no longer improves."""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from eqxmeta._arguments import check_argument, check_int, check_int_or_none
from eqxmeta._callback.callback import Callback, KnownNames
from eqxmeta._callback.monitor import Monitor
from eqxmeta._callback.published import Published
from eqxmeta._callback.run import Run
from eqxmeta._direction import Mode
from eqxmeta._errors import warn


class EarlyStopping(Callback):
    """Ends the run when `monitor` has not improved for `patience` observations in a row.

    An observation is a value logged under that name: a number, or the last point of a curve
    over inner steps, such as `"eval/loss"` of `Evaluate` (`"eval/loss/after_1"`: the point after 1
    inner step). With `every`, it is the training metric
    of that name, `"loss"` for example, at the outer steps that are multiples of `every`. What is
    logged only because the run ends, such as the last evaluation, is no observation.

    - `min_delta`: a smaller change than this is no improvement.
    - `mode`: `"min"` if less is better, `"max"` if more is. `None`: as for `Checkpoint`.

    A `monitor` that no callback will log is refused (`ValueError`; `KeyError` with `every`) before
    the first step, or, if there are callbacks of your own, warned of once each has had its turn.
    Warns at the end of the run if there was nothing to observe.
    """

    logs = ()
    state_types = MappingProxyType(
        {
            "best": int | float | None,
            "best_step": int | None,
            "waited": int,
            "observed": bool,
        }
    )

    def __init__(
        self,
        monitor: str,
        *,
        patience: int,
        min_delta: float = 0.0,
        mode: Mode | None = None,
        every: int | None = None,
        name: str | None = None,
    ):
        sound = isinstance(monitor, str) and monitor
        check_argument(sound, monitor, "EarlyStopping(monitor=...)", "a name")
        sound = isinstance(min_delta, int | float | np.number) and 0 <= min_delta < math.inf
        expected = "a finite number, 0 or more"
        check_argument(sound, min_delta, "EarlyStopping(min_delta=...)", expected)
        argument = "EarlyStopping(patience=...)"
        self.patience = check_int(patience, argument, minimum=1, what="observations")
        argument = "EarlyStopping(every=...)"
        self.every = check_int_or_none(every, argument, minimum=1, what="outer steps")
        self.monitor = monitor
        self.min_delta = min_delta
        self.mode = mode
        self.name = name
        self._monitor = Monitor("EarlyStopping", monitor, mode)
        self._restored: dict[str, Any] = {}

    def check_monitor(self, known: KnownNames) -> None:
        if self.every is not None:
            self._check_metric(known.metrics)
        elif known.logged is not None:
            metric = self.monitor in known.metrics
            also = "; a training metric if `every` is given" if metric else ""
            self._monitor.check(known.logged, also)
        self._monitor.direction(known.declared)

    def on_fit_start(self, run: Run) -> None:
        self._monitor.begin(run)
        restored, self._restored = self._restored, {}
        if any(restored.get(name, now) != now for name, now in self._watched.items()):
            restored = {}  # what another monitor has seen
        self._best: float | None = restored.get("best")
        self._best_step: int | None = restored.get("best_step")
        self._waited: int = restored.get("waited", 0)
        self._observed: bool = restored.get("observed", False)
        self._newest: float | None = None
        self._stop_if_due(run)

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        if self.every is None:
            # At the step of a hook the hooks are yet to come.
            if not self._observed:
                self._monitor.warn_if_overdue(run, before=True)
            return
        self._check_metric(metrics)
        self._newest = float(metrics[self.monitor][-1])

    def on_step_end(self, run: Run) -> None:
        if self._newest is not None:
            self._observe(run, self._newest)

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        # What is logged at the end of a run an uninterrupted one would not have seen.
        if self.every is not None or run.ended:
            return
        value = self._monitor.find(scalars)
        if value is not None:
            self._observe(run, value)

    def on_fit_end(self, run: Run) -> None:
        if not self._observed and not self._monitor.warned:
            if self.every is None:
                seen = sorted(self._monitor.seen) or "nothing"
                why = f"before the end of the run was logged: {seen}"
            else:
                why = f"the run ended before it came to a multiple of {self.every} steps"
            warn(f"EarlyStopping never saw {self.monitor!r}: {why}.", UserWarning)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self._best, "best_step": self._best_step}
        return self._watched | best | {"waited": self._waited, "observed": self._observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = dict(state)

    @property
    def _watched(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self._monitor.mode}

    def _check_metric(self, metrics: Collection[str]) -> None:
        argument, fault = "EarlyStopping(monitor=...)", "is not a training metric"
        expected = f"one of {sorted(set(metrics) - {'step'})}; without `every`, a logged name"
        check_argument(self.monitor in metrics, self.monitor, argument, expected, KeyError, fault)

    def _observe(self, run: Run, value: float) -> None:
        self._observed = True
        if self._monitor.improves(value, self._best, self.min_delta):
            self._best, self._best_step, self._waited = value, run.step, 0
        else:
            self._waited += 1
        self._stop_if_due(run)

    def _stop_if_due(self, run: Run) -> None:
        # Also at the start: a run that had stopped does not go on because it was resumed.
        if self._waited >= self.patience:
            best = "none" if self._best is None else f"{self._best:.6g} at step {self._best_step}"
            run.request_stop(
                f"{self.monitor!r} has not improved for {self._waited} observations (best: {best})"
            )
