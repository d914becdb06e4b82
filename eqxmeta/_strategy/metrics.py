"""Metrics of an outer step: their names, and the few arrays that keep them in the compiled loop."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import explain
from .._types import Metrics

# What `outer_update` adds to the metrics of the user's loss.
RESERVED = ("loss", "loss_before", "pooled_loss", "objective", "grad_norm", "step")

# The metric of a run that skips steps: 1 for a step that was not taken, 0 for others.
SKIPPED = "skipped"

_LOGGED = jnp.bool_, jnp.integer, jnp.floating

LOSS = "`loss(model, batch, key)`"


def learning_rate(opt_state: PyTree) -> Metrics:
    """The outer step's rate as a metric, where `optax.inject_hyperparams` keeps it in the state."""

    def is_injected(x: Any) -> bool:
        return isinstance(x, tuple) and hasattr(x, "hyperparams")

    states = filter(is_injected, jax.tree.leaves(opt_state, is_leaf=is_injected))
    found = [x for state in states if (x := state.hyperparams.get("learning_rate")) is not None]
    return {"learning_rate": found[0]} if len(found) == 1 and not found[0].ndim else {}


def check_loss_output(out: Any) -> None:
    """Raises `TypeError` or `ValueError` unless `out`, of the user's loss, is a floating-point
    scalar and a dict of scalars under names of their own."""
    _check_value_and_metrics(out, LOSS)
    check_scalars(out[1], f"The metrics of {LOSS}")
    taken = [
        name
        for name in out[1]
        if name in RESERVED
        or name == "support_loss"
        or name.startswith("support_loss/")
        or (name.endswith("_before") and name.removesuffix("_before") in out[1])
    ]
    if taken:
        message = "The loss reports a metric under a reserved name."
        raise ValueError(explain(message, taken, f"names other than {RESERVED}"))


def check_task_loss_output(out: Any, strategy: str) -> None:
    """The same of a strategy's `task_loss`, whose metrics may be vectors, and have a `loss`."""
    what = f"`{strategy}.task_loss(...)`"
    _check_value_and_metrics(out, what)
    check_scalars(out[1], f"The metrics of {what}", max_ndim=1)
    if taken := sorted({"objective", "grad_norm"} & out[1].keys()):
        message = f"The metrics of {what} use a reserved name."
        raise ValueError(explain(message, taken, "another name"))


def _check_value_and_metrics(out: Any, what: str) -> None:
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        expected = "(scalar, dict of scalar metrics)"
        message = f"{what} returned something else than a pair."
        raise TypeError(explain(message, show(out), expected))
    value, _ = out
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        expected = "a floating-point scalar: a mean over examples"
        message = f"The first value of {what} is not a loss."
        raise ValueError(explain(message, show(value), expected))


def check_scalars(metrics: Mapping[Any, Any], what: str, *, max_ndim: int = 0) -> None:
    """Raises `ValueError` unless they are real numbers, or booleans, that can be logged."""
    for name, value in metrics.items():
        sound = isinstance(name, str) and getattr(value, "ndim", max_ndim + 1) <= max_ndim
        if not sound or not any(jnp.issubdtype(value.dtype, kind) for kind in _LOGGED):
            expected = (
                "scalar arrays of real numbers under string names" + ", or vectors" * max_ndim
            )
            raise ValueError(explain(f"{what} are invalid.", f"{name!r}: {show(value)}", expected))


def show(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype.name}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text[:200]}"


def by_step(metrics: Mapping[str, Array]) -> Metrics:
    """`support_loss: [steps]` as `support_loss/0`, `support_loss/1`, ...

    As late as possible: one array goes through the derivatives and the mean over tasks, where
    hundreds of scalars would make the program large and slow to compile.
    """
    scalars: Metrics = {}
    for name, value in metrics.items():
        if value.ndim == 0:
            scalars[name] = value
        else:
            scalars |= {f"{name}/{i}": x for i, x in enumerate(jnp.unstack(value))}
    return scalars


class MetricColumns(eqx.Module):
    """Named scalars, of which those of a series `x/0`, `x/1`, ... are the columns of one array.

    To the compiler every array that a program returns is a kernel of its own: with one for each of
    512 inner steps, compiling them took twice as long as all else. (Nor should all be one array: a
    kernel that computes a scalar can also put it where it belongs, but not into a vector.)

    - `arrays`: `[columns]`, or `[..., steps, columns]` of several outer steps; one for each series
      and for each scalar that is in none.
    - `names`: those of the columns of each array.
    """

    arrays: tuple[Array, ...]
    names: tuple[tuple[str, ...], ...] = eqx.field(static=True)

    def rows(self, count: int) -> dict[str, np.ndarray]:
        """Each name's values at the first `count` steps, `[..., count]`, in the order of the names.
        On the host, where these are views."""
        values = {
            name: np.asarray(array)[..., :count, column]
            for array, names in zip(self.arrays, self.names, strict=True)
            for column, name in enumerate(names)
        }
        return {name: values[name] for name in sorted(values)}


def columns(scalars: Mapping[str, Array]) -> MetricColumns:
    """`scalars` as one vector for each series, if it is of one dtype."""
    series: dict[tuple[str, str], dict[str, Array]] = {}
    # Shorter names first, so that `x/2` is before `x/10`: what `by_step` took out of one array is
    # put back as it was, and the compiler leaves no trace of either.
    for name in sorted(scalars, key=lambda name: (len(name), name)):
        scalar = jnp.asarray(scalars[name])
        series.setdefault((_stem(name), scalar.dtype.name), {})[name] = scalar
    arrays = tuple(jnp.stack(list(members.values())) for members in series.values())
    return MetricColumns(arrays, tuple(map(tuple, series.values())))


def _stem(name: str) -> str:
    stem, slash, number = name.rpartition("/")
    return stem + slash if number.isdecimal() and slash else name
