"""Which way a metric improves: what the library knows, and what a loss declares."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypeVar, cast

import equinox as eqx

from ._arguments import check_argument, check_choice
from ._errors import explain
from ._types import Loss

Mode: TypeAlias = Literal["min", "max"]
_Loss = TypeVar("_Loss", bound=Loss)

# What the library itself reports, and the names of its losses.
_KNOWN: dict[str, Mode] = {
    "loss": "min",
    "pooled_loss": "min",
    "support_loss": "min",
    "objective": "min",
    "mse": "min",
    "cross_entropy": "min",
    "sigmoid_mse": "min",
    "gaussian_nll": "min",
    "accuracy": "max",
}


class Directed(eqx.Module):
    """`loss`, and by name the directions of the metrics that it reports."""

    loss: Loss
    directions: tuple[tuple[str, Mode], ...] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.loss(*args, **kwargs)


def directed(loss: _Loss, /, **directions: Mode) -> _Loss:
    """`loss`, declaring which way the metrics that it reports improve: `f1="max"` if more is
    better, `"min"` if less is. It computes what it computed.

        loss = em.losses.directed(loss, f1="max")

    Then `Checkpoint(monitor="eval/f1")` and `EarlyStopping` need no `mode`. `loss` and `accuracy`
    are known.

    Raises `TypeError` or `ValueError` for other arguments.
    """
    argument, what = "directed(loss)", "`loss(model, batch, key) -> (scalar, metrics)`"
    sound = callable(loss) and not isinstance(loss, type)
    check_argument(sound, loss, argument, what, TypeError)
    check_argument(directions, directions, "directed(...)", "metrics, such as `f1='max'`")
    for name, mode in directions.items():
        argument = f"directed({name}=...)"
        check_choice(mode, argument, ("min", "max"))
        if mode == "max" and _KNOWN.get(name) == "min":  # what is descended
            raise ValueError(explain(f"`{argument}` is invalid.", repr(mode), "'min'"))
        if name != metric_of(name):
            expected = f"{metric_of(name)!r}, which stands for it wherever it is logged"
            raise ValueError(explain("`directed` was given a name in full.", repr(name), expected))
    known: dict[str, Mode] = {}
    inside: Loss = loss
    if isinstance(loss, Directed):
        inside, known = loss.loss, dict(loss.directions)
    # To a type checker it is what it was: a partial of it may set the same arguments.
    return cast(_Loss, Directed(inside, tuple((known | directions).items())))


def metric_of(name: str) -> str:
    """The metric that is logged as `name`: `"accuracy"` of `"val/accuracy"`,
    `"eval/accuracy/after_1"` and `"accuracy_before"`, `"support_loss"` of `"support_loss/0"`."""
    last = re.sub(r"/(after_)?\d+$", "", name).rpartition("/")[2]
    return last.removesuffix("_before")


def direction(name: str, declared: Mapping[str, Mode]) -> Mode | None:
    """Which way the value that is logged as `name` improves; `None` if nobody says."""
    metric = metric_of(name)
    return declared[metric] if metric in declared else _KNOWN.get(metric)


def improves(value: float, best: float | None, mode: Mode | None, min_delta: float = 0.0) -> bool:
    """Whether `value` is better than `best`, if there is one. No run should aim at NaN or infinity,
    which JSON could not hold either."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return (best - value if mode == "min" else value - best) > min_delta


def declared_by(strategy: Any) -> dict[str, Mode]:
    """The directions that the losses of `strategy` declare, by metric."""
    # A loss may be a property or a method, beside what is in the fields.
    return _declared(strategy) | _declared(getattr(strategy, "loss", None))


def _declared(x: Any) -> dict[str, Mode]:
    """At any depth: within another strategy, a partial, a compiled function."""
    if isinstance(x, Directed):
        return _declared(x.loss) | dict(x.directions)
    parts: list[Any] = []
    if dataclasses.is_dataclass(x) and not isinstance(x, type):  # as every Equinox module is
        parts = [getattr(x, field.name, None) for field in dataclasses.fields(x)]
    elif isinstance(x, functools.partial):
        parts = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, Mapping | tuple | list):
        parts = list(x.values() if isinstance(x, Mapping) else x)
    if callable(x):
        parts.append(getattr(x, "__wrapped__", None))
    found: dict[str, Mode] = {}
    for part in parts:
        found |= _declared(part)
    return found
