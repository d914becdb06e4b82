"""Whether what is monitored will have a value: found before the run where that can be known."""

from collections.abc import Collection, Iterable

from .._errors import explain, warn
from .callback import Callback, name_of
from .run import Run


def check_monitors(callbacks: Iterable[Callback], metrics: Collection[str]) -> None:
    """Let every callback compare its monitor with the names that there will be: of the training
    `metrics`, and of what the callbacks say that they log."""
    callbacks = tuple(callbacks)
    names: set[str] | None = set()
    for callback in callbacks:
        # A user's subclass of one of ours may log more than that one says.
        says = callback.logs if "logs" in vars(type(callback)) else None
        _refuse_twice(callback, says or (), callbacks)
        names = None if names is None or says is None else names | set(says)
    for callback in callbacks:
        callback.check_monitor(metrics, names)


def _refuse_twice(
    callback: Callback, says: Collection[str], callbacks: tuple[Callback, ...]
) -> None:
    """Raises `ValueError` if another callback logs under one of the same names: of two values at a
    step one would be lost."""
    for other in callbacks:
        same = sorted(set(says) & set(other.logs or ())) if other is not callback else []
        if same:
            raise ValueError(
                explain(
                    "Two callbacks log under the same name.",
                    f"{same[0]!r}, of {name_of(other)} and {name_of(callback)}",
                    "names of their own: `Evaluate(prefix=...)` is for that",
                )
            )


def check_named(monitor: str, argument: str, names: Collection[str], advice: str) -> None:
    """Raises `ValueError` unless `monitor` is one of `names`, or a point of the curve that is."""
    curve, _, point = monitor.rpartition("/after_")
    if monitor in names or (curve in names and point.isdecimal()):
        return
    message = f"`{argument}` is invalid: no callback logs this name."
    some = f"one of {', '.join(sorted(names))}" if names else "a name that a callback logs"
    raise ValueError(explain(message, repr(monitor), f"{some}{advice}"))


def warn_overdue(run: Run, monitor: str, argument: str, seen: Collection[str]) -> None:
    """Nobody could know before the run what the user's own callbacks log. By now each has had
    its turn, and a name that has not come yet is more likely misspelt than late."""
    warn(
        explain(
            f"`{argument}` has no value after {run.step:,} steps.",
            f"{monitor!r}; so far there were {', '.join(sorted(seen)) or 'no values at all'}",
            "a name that a callback logs",
        )
    )


def is_overdue(run: Run, *, before: bool = False) -> bool:
    """Whether every callback's `on_step_end` has been called in this run; `before` this step's."""
    return run.cadence is not None and run.step - run.start - before >= run.cadence
