"""A warning before convolutions are compiled into a loop in which they are slow."""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from .._errors import explain, warn
from .._jaxpr.flops import equations

# Operations of an outer step's convolutions, loops counted once, below which nobody waits for them.
_MATTERS = 10_000_000


def warn_slow_convolutions(closed: ClosedJaxpr) -> None:
    """Warn if the outer step `closed` has convolutions that the CPU's loops make slow."""
    if jax.default_backend() != "cpu":
        return
    convolutions = [e for e in equations(closed.jaxpr) if e.primitive.name == _PRIMITIVE]
    if sum(map(_operations, convolutions)) < _MATTERS:
        return
    warn(
        explain(
            "The convolutions of this model will be slow, often by ten times: inside of a compiled "
            "loop, and under `vmap` over the weights, a CPU has no fast kernel for them.",
            f"an outer step with {len(convolutions)} `{_PRIMITIVE}`",
            "the same parameters in eqxmeta's layers: `model = eqxmeta.nn.fast(model)`",
        ),
    )


_PRIMITIVE = "conv_general_dilated"


def _operations(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // max(outputs, 1))
