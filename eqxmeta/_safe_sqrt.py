"""Make the derivative of an optimizer's update finite where a gradient is exactly zero.

Adam divides by `sqrt(v)`. Where a unit is dead, its gradient and so `v` are exactly zero, the
derivative of the square root is infinite, the chain rule multiplies it by zero, and the
meta-gradient is NaN. The update itself is differentiable there: with `m = v = 0` the factor that
multiplies the root's derivative is zero. Taking that derivative to be zero at zero gives the
right answer without `eps_root`, which would change the forward pass.

The optimizer is any optax transformation, so its code cannot be edited; its trace can.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import sqrt_p


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
        out = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return wrapped


def _inner_jaxpr(eqn) -> ClosedJaxpr | None:
    """The body of a nested `jax.jit`, which may as well be inlined here."""
    body = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
    return body if isinstance(body, ClosedJaxpr) else None


def _has_sqrt(closed: ClosedJaxpr) -> bool:
    for eqn in closed.jaxpr.eqns:
        body = _inner_jaxpr(eqn)
        if eqn.primitive is sqrt_p or (body is not None and _has_sqrt(body)):
            return True
    return False


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    jaxpr = closed.jaxpr
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        body = _inner_jaxpr(eqn)
        if eqn.primitive is sqrt_p:
            outputs = [safe_sqrt(*inputs)]
        elif body is not None and _has_sqrt(body):
            outputs = _evaluate(body, inputs)
        else:
            params = eqn.primitive.get_bind_params(eqn.params)
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
