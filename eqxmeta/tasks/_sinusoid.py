"""Few-shot regression of sine waves."""

import math
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_int
from .._errors import explain
from .._task.task import Task

# Run-time type checkers do not take an int for a float.
Range: TypeAlias = tuple[float | int, float | int]


class Sinusoid(eqx.Module):
    """Regression tasks: sine waves of random amplitude and phase, `y = A sin(x - phase)`.

    From Finn, Abbeel, Levine 2017 (MAML, arXiv 1703.03400), section 5.1; the sign of the phase
    is that of the paper's code. Amplitude, phase and the inputs are uniform over their ranges.

    The paper's text and code draw the phase from [0, pi]: `phase=(0, math.pi)`. The wider default
    covers every phase, so that the average of all tasks is zero and says nothing about any of
    them. With [0, pi], two references in mean squared error: predicting zero gives 4.25, and the
    best predictor that does not look at the task gives 3.01.

    - `shots`: support examples a task.
    - `queries`: query examples a task.
    - `amplitude`, `phase`, `x_range`: `(low, high)`; equal ends fix the value.

    Raises `TypeError` or `ValueError`, naming the argument, for counts below 1 and for ranges
    that are not finite or whose ends are swapped.
    """

    shots: int = eqx.field(static=True)
    queries: int = eqx.field(static=True)
    amplitude: tuple[float, float] = eqx.field(static=True)
    phase: tuple[float, float] = eqx.field(static=True)
    x_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        shots: int,
        queries: int,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (-math.pi, math.pi),
        x_range: Range = (-5.0, 5.0),
    ):
        self.shots = check_int(shots, "shots", minimum=1, what="support examples a task")
        self.queries = check_int(queries, "queries", minimum=1, what="query examples a task")
        self.amplitude = _checked_range(amplitude, "amplitude")
        self.phase = _checked_range(phase, "phase")
        self.x_range = _checked_range(x_range, "x_range")

    def sample(self, key: PRNGKeyArray) -> Task:
        """A task: support `x, y: [shots, 1]`, query `x, y: [queries, 1]`, in the default float
        dtype. Pure, for use inside `jit`, `vmap` and loops."""
        # One draw for everything: on a small model, hashing keys takes a good part of a step.
        draws = jax.random.uniform(key, (2 + self.shots + self.queries,))
        amplitude = _stretch(draws[0], self.amplitude)
        phase = _stretch(draws[1], self.phase)
        x = _stretch(draws[2:, None], self.x_range)
        y = amplitude * jnp.sin(x - phase)
        return Task((x[: self.shots], y[: self.shots]), (x[self.shots :], y[self.shots :]))


def _stretch(unit: Float[Array, "*shape"], interval: tuple[float, float]) -> Float[Array, "*shape"]:
    low, high = interval
    return low + (high - low) * unit


def _checked_range(value: object, argument: str) -> tuple[float, float]:
    expected = "a pair `(low, high)` of finite numbers with low <= high"
    try:
        low, high = value  # pyright: ignore[reportGeneralTypeIssues]
        sound = math.isfinite(low) and math.isfinite(high) and low <= high
    except (TypeError, ValueError):
        raise TypeError(explain(f"`{argument}` is not a range.", repr(value), expected)) from None
    if not sound:
        raise ValueError(explain(f"`{argument}` is not a range.", repr(value), expected))
    return float(low), float(high)
