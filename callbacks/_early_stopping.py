"""A callback that ends a run which no longer improves."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from eqxmeta._arguments import check_int
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.monitor import check_named, is_overdue, warn_overdue
from eqxmeta._callback.published import Published, logged_value
from eqxmeta._callback.run import Run
from eqxmeta._errors import explain, warn


def _is_size(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and bool(0 <= x < math.inf)


class EarlyStopping(Callback):
    """Ends the run when `monitor` has not improved for `patience` observations in a row.

    An observation is a value logged under that name: a number, or the last point of a curve
    over inner steps, such as `"eval/loss"` of `Evaluate` (`"eval/loss/after_1"`: the point after 1
    inner step). With `every`, it is the training metric
    of that name, `"loss"` for example, at the outer steps that are multiples of `every`.

    - `min_delta`: a smaller change than this is no improvement.
    - `mode`: `"min"` if less is better, `"max"` if more is.

    A `monitor` that no callback will log is refused (`ValueError`; `KeyError` with `every`) before
    the first step, or, if there are callbacks of your own, warned of once each has had its turn.
    Warns at the end of the run if there was nothing to observe.
    """

    logs = ()

    def __init__(
        self,
        monitor: str,
        *,
        patience: int,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        every: int | None = None,
        name: str | None = None,
    ):
        patience = check_int(
            patience, "EarlyStopping(patience=...)", minimum=1, what="observations"
        )
        if every is not None:
            every = check_int(
                every, "EarlyStopping(every=...)", minimum=1, what="outer steps, or None"
            )
        for argument, value, valid, expected in (
            ("monitor", monitor, isinstance(monitor, str) and monitor != "", "a name"),
            ("min_delta", min_delta, _is_size(min_delta), "a finite number, 0 or more"),
            ("mode", mode, mode in ("min", "max"), "'min' or 'max'"),
        ):
            if not valid:
                message = f"`EarlyStopping({argument}=...)` is invalid."
                raise ValueError(explain(message, repr(value), expected))
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.every = every
        self.name = name
        self._restored: dict[str, Any] = {}

    def check_monitor(self, metrics: Collection[str], logged: Collection[str] | None) -> None:
        if self.every is not None:
            self._check_metric(metrics)
        elif logged is not None:
            also = "; a training metric if `every` is given" if self.monitor in metrics else ""
            check_named(self.monitor, "EarlyStopping(monitor=...)", logged, also)

    def on_fit_start(self, run: Run) -> None:
        self._best: float | None = self._restored.get("best")
        self._best_step: int | None = self._restored.get("best_step")
        self._waited: int = self._restored.get("waited", 0)
        self._observed: bool = self._restored.get("observed", False)
        self._restored = {}
        self._newest: float | None = None
        self._others: set[str] = set()
        self._told = False  # that there is nothing of that name
        self._stop_if_due(run)

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        if self.every is None:
            # At the step of a hook the hooks are yet to come.
            if not self._observed and not self._told and is_overdue(run, before=True):
                self._told = True
                warn_overdue(run, self.monitor, "EarlyStopping(monitor=...)", self._others)
            return
        self._check_metric(metrics)
        self._newest = float(metrics[self.monitor][-1])

    def on_step_end(self, run: Run) -> None:
        if self._newest is not None:
            self._observe(run, self._newest)

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        if self.every is not None:
            return
        self._others |= set(scalars)
        value = logged_value(scalars, self.monitor)
        if value is not None:
            self._observe(run, value)

    def on_fit_end(self, run: Run) -> None:
        if not self._observed and not self._told:
            if self.every is None:
                why = f"what was logged: {sorted(self._others) or 'nothing'}"
            else:
                why = f"the run ended before it came to a multiple of {self.every} steps"
            warn(f"EarlyStopping never saw {self.monitor!r}: {why}.", UserWarning)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "observed": self._observed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = dict(state)

    def _check_metric(self, metrics: Collection[str]) -> None:
        if self.monitor not in metrics:
            raise KeyError(
                explain(
                    "`EarlyStopping(monitor=...)` is not a training metric.",
                    repr(self.monitor),
                    f"one of {sorted(set(metrics) - {'step'})}; without `every`, a logged name",
                )
            )

    def _observe(self, run: Run, value: float) -> None:
        self._observed = True
        if self._improves(value):
            self._best, self._best_step, self._waited = value, run.step, 0
        else:
            self._waited += 1
        self._stop_if_due(run)

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):  # JSON could not hold it, and no run should aim at it
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.mode == "min" else value - self._best
        return gain > self.min_delta

    def _stop_if_due(self, run: Run) -> None:
        # Also at the start: a run that had stopped does not go on because it was resumed.
        if self._waited >= self.patience:
            best = "none" if self._best is None else f"{self._best:.6g} at step {self._best_step}"
            run.request_stop(
                f"{self.monitor!r} has not improved for {self._waited} observations (best: {best})"
            )
