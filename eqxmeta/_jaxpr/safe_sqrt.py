"""An optimizer's square roots, with a finite derivative where a gradient is exactly zero.

Adam divides by `sqrt(v)`. Where a unit is dead, its gradient and so `v` are exactly zero, the
derivative of the square root is infinite, the chain rule multiplies it by zero, and the
meta-gradient is NaN. The update itself is differentiable there: with `m = v = 0` the factor that
multiplies the root's derivative is zero. Taking that derivative to be zero at zero gives the
right answer without `eps_root`, which would change the forward pass.

Other functions with such a slope are left alone: Adafactor's `(v + 1e-30)**-0.5`, whose derivative
overflows in float32, still gives NaN where a gradient is exactly zero.

The optimizer is any optax transformation, so its code cannot be edited; its trace can.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.extend.core.primitives import sqrt_p

from .interpret import interpret, jit_body


@jax.custom_jvp
def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root, whose derivative at zero is zero rather than infinite."""
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = safe_sqrt(x)
    at_zero = root == 0
    slope = jnp.where(at_zero, 0, 0.5 / jnp.where(at_zero, 1, root))
    return root, dx * slope.astype(dx.dtype)


def with_safe_sqrt(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, a function of pytrees of arrays, with every `sqrt` in it replaced by `safe_sqrt`.

    Square roots inside control flow (`lax.cond`, `lax.scan`) are left as they are.
    """

    def wrapped(*args):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        if not _has_sqrt(closed):
            return fun(*args)
        out = interpret(closed, jax.tree.leaves(args), _replaced)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return wrapped


def _has_sqrt(closed: ClosedJaxpr) -> bool:
    for eqn in closed.jaxpr.eqns:
        body = jit_body(eqn)
        if eqn.primitive is sqrt_p or (body is not None and _has_sqrt(body)):
            return True
    return False


def _replaced(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
    if eqn.primitive is sqrt_p:
        return [safe_sqrt(*inputs)]
    body = jit_body(eqn)
    if body is not None and _has_sqrt(body):
        return interpret(body, inputs, _replaced)
    return None
