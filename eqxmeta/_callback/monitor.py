"""What a callback watches, and whether it will have a value: known before the run if possible."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .._arguments import check_choice
from .._direction import Mode, declared_by, direction, improves
from .._errors import explain, warn
from .callback import Callback, KnownNames, name_of
from .published import Histogram, Image, logged_value
from .run import Run


def check_monitors(
    callbacks: Iterable[Callback], metrics: Collection[str], strategy: Any = None
) -> None:
    """Let every callback compare its monitor with the names that there will be: of the training
    `metrics`, and of what the callbacks say that they log; and with the directions that the losses
    of `strategy` declare."""
    callbacks = tuple(callbacks)
    names: set[str] | None = set()
    for callback in callbacks:
        # A user's subclass of one of ours may log more than that one says.
        says = callback.logs if "logs" in vars(type(callback)) else None
        _refuse_twice(callback, says or (), callbacks)
        names = None if names is None or says is None else names | set(says)
    known = KnownNames(metrics, names, declared_by(strategy))
    for callback in callbacks:
        callback.check_monitor(known)


def _refuse_twice(
    callback: Callback, says: Collection[str], callbacks: tuple[Callback, ...]
) -> None:
    """Raises `ValueError` if another callback logs under one of the same names: of two values at a
    step one would be lost."""
    for other in callbacks:
        same = sorted(set(says) & set(other.logs or ())) if other is not callback else []
        if same:
            received = f"{same[0]!r}, of {name_of(other)} and {name_of(callback)}"
            expected = "names of their own: `Evaluate(prefix=...)` is for that"
            raise ValueError(explain("Two callbacks log under the same name.", received, expected))


class Monitor:
    """The value that a callback watches: how it is found, and whether it is better than another.

    - `owner`: the class with the arguments `monitor` and `mode`, for errors.
    - `name`: `None` if nothing is watched.
    - `mode`: `"min"` if less is better, `"max"` if more is. `None`: what the metric's direction
      is, of which `mode` knows once a run has begun.
    """

    def __init__(self, owner: str, name: str | None, mode: Mode | None):
        if mode is not None:
            check_choice(mode, f"{owner}(mode=...)", ("min", "max"))
        self.argument = f"{owner}(monitor=...)"
        self.name = name
        self._owner = owner
        self._asked: Mode | None = mode
        self.mode: Mode | None = mode
        self.forget()

    def begin(self, run: Run) -> None:
        self.forget()
        self.mode = self.direction(declared_by(run.strategy))

    def forget(self) -> None:
        self.seen: set[str] = set()  # names that had a value
        self.warned = False  # that this one had none

    def direction(self, declared: Mapping[str, Mode]) -> Mode | None:
        """What was asked for, or what is known of the metric. Raises `ValueError` if there is
        neither: of the wrong one nobody would learn."""
        if self.name is None or self._asked is not None:
            return self._asked
        mode = direction(self.name, declared)
        if mode is None:
            message = f"`{self._owner}(mode=...)` is needed: nobody says which way this improves."
            expected = "'min' or 'max'; or a loss that says so of the metrics that it reports: "
            expected += "`eqxmeta.losses.directed(loss, f1='max')`"
            received = f"monitor={self.name!r}, mode=None"
            raise ValueError(explain(message, received, expected))
        return mode

    def check(self, names: Collection[str], advice: str = "") -> None:
        """Raises `ValueError` unless it is one of `names`, or a point of the curve that is."""
        curve, _, point = (self.name or "").rpartition("/after_")
        if self.name is None or self.name in names or (curve in names and point.isdecimal()):
            return
        message = f"`{self.argument}` is invalid: no callback logs this name."
        some = f"one of {', '.join(sorted(names))}" if names else "a name that a callback logs"
        raise ValueError(explain(message, repr(self.name), f"{some}{advice}"))

    def find(self, values: Mapping[str, Any]) -> float | None:
        """Its number among logged `values`."""
        pictures = Image | Histogram
        self.seen.update(name for name, x in values.items() if not isinstance(x, pictures))
        return None if self.name is None else logged_value(values, self.name)

    def improves(self, value: float, best: float | None, min_delta: float = 0.0) -> bool:
        return improves(value, best, self.mode, min_delta)

    def warn_if_overdue(self, run: Run, *, before: bool = False) -> None:
        """To be called while there has been no value. Nobody could know before the run what the
        user's own callbacks log; once each has had its turn (`before`: before that of this step),
        a name that has not come is more likely misspelt than late. Warns once."""
        steps = run.step - run.start - before
        if self.name is None or self.warned or run.cadence is None or steps < run.cadence:
            return
        self.warned = True
        message = f"`{self.argument}` has no value after {run.step:,} steps."
        so_far = f"so far there were {', '.join(sorted(self.seen)) or 'no values at all'}"
        warn(explain(message, f"{self.name!r}; {so_far}", "a name that a callback logs"))
