"""Metrics of an outer step: their names, and the few arrays that keep them in the compiled loop."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._errors import explain
from .._types import Metrics

# What `outer_update` adds to the metrics of the user's loss.
RESERVED = ("loss", "loss_before", "loss_after", "pooled_loss", "grad_norm", "step")

# The metric of a run that skips steps: 1 for a step that was not taken, 0 for others.
SKIPPED = "skipped"


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the user's loss reports a metric under a name of the library's."""
    clash = [
        name
        for name in metrics
        if name in RESERVED
        or name == "support_loss"
        or name.startswith("support_loss/")
        or (name.endswith("_before") and name.removesuffix("_before") in metrics)
    ]
    if clash:
        raise ValueError(
            explain(
                "The loss reports a metric under a reserved name.",
                clash,
                f"names other than {RESERVED}",
            )
        )
    for name, value in metrics.items():
        if jnp.shape(value) != ():
            received = f"{name!r} of shape {jnp.shape(value)}"
            raise ValueError(
                explain("A metric of the loss is not a scalar.", received, "means over examples")
            )


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
