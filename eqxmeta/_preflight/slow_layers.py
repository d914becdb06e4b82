"""Where `eqxmeta.nn.fast` would help: a warning for convolutions, else a line of the summary."""

from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from .._errors import explain, warn
from .._jaxpr.flops import equations, flops_of_equation
from .._task.mesh import platform

# Operations of an outer step's convolutions, loops counted once, below which nobody waits for them.
_MATTERS = 10_000_000
_PRIMITIVE = "conv_general_dilated"


def warn_slow_convolutions(closed: ClosedJaxpr) -> None:
    """Warn if the outer step `closed` has convolutions that the CPU's loops make slow."""
    if platform() != "cpu":
        return
    convolutions = [e for e in equations(closed.jaxpr) if e.primitive.name == _PRIMITIVE]
    if sum(map(flops_of_equation, convolutions)) < _MATTERS:
        return
    message = (
        "The convolutions of this model will be slow, often by ten times: inside of a compiled "
        "loop, and under `vmap` over the weights, a CPU has no fast kernel for them."
    )
    received = f"an outer step with {len(convolutions)} `{_PRIMITIVE}`"
    expected = "the same parameters in eqxmeta's layers: `model = eqxmeta.nn.fast(model)`"
    warn(explain(message, received, expected))


def linear_layers(model: PyTree) -> int:
    """How many layers of `model` are plain `eqx.nn.Linear`; 0 for a model with convolutions on a
    CPU, for which the warning above speaks."""
    kinds = [type(x) for x in jax.tree.leaves(model, is_leaf=_is_layer) if _is_layer(x)]
    warned = platform() == "cpu" and any(kind is not eqx.nn.Linear for kind in kinds)
    return 0 if warned else kinds.count(eqx.nn.Linear)


def _is_layer(x: Any) -> bool:
    return type(x) in (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.Conv2d)
