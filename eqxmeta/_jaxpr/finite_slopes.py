"""An optimizer's arithmetic, with a finite derivative where a gradient is exactly zero.

Adam divides by `sqrt(v)`. Where a unit is dead, its gradient and so `v` are exactly zero, the
derivative of the square root is infinite, the chain rule multiplies it by zero, and the
meta-gradient is NaN. The update itself is differentiable there: with `m = v = 0` the factor that
multiplies the root's derivative is zero. Likewise LAMB divides by the norm of an update, and
selects another value where that is zero: the quotient's derivative is NaN, and counts for nothing.

So of every operation whose derivative may be infinite or NaN, it is taken to be zero where it is:
right wherever the chain rule multiplies it by zero, and that without an `eps`, which would change
the forward pass. (A root that does count at zero, `sqrt(|g|)`, has an infinite derivative in truth,
and zero here.)

The optimizer is any optax transformation, so its code cannot be edited; its trace can.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from .interpret import interpret, jit_body

# Elementwise operations whose derivative may not be finite where their inputs are.
_STEEP = {
    "acos", "acosh", "asin", "atan2", "atanh", "cbrt", "div", "erf_inv", "exp", "exp2", "expm1",
    "integer_pow", "lgamma", "log", "log1p", "pow", "rem", "rsqrt", "sqrt", "tan",
}  # fmt: skip
# What keeps an infinity as it is.
_KEEPS = {
    "broadcast_in_dim", "convert_element_type", "mul", "neg", "reshape", "squeeze", "transpose",
}  # fmt: skip


def with_finite_slopes(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, a function of pytrees of arrays, with the derivatives of its operations made finite:
    those inside of `jax.jit`, `lax.cond` and `lax.scan` too, but not of a `lax.while_loop`."""

    def wrapped(*args):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        out = _run(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return wrapped


def _run(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    def run(*args):
        flat = jax.make_jaxpr(lambda *args: interpret(closed, args, _inlined))(*args)
        steep = _steep(flat.jaxpr)

        def replaced(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
            if id(eqn) in steep:
                return [_with_finite_slopes(eqn, steep[id(eqn)])(*inputs)]
            if eqn.primitive.name == "cond":
                branches = [_run(body) for body in eqn.params["branches"]]
                return jax.lax.switch(inputs[0], branches, *inputs[1:])
            return _scan(eqn.params, inputs) if eqn.primitive.name == "scan" else None

        return interpret(flat, args, replaced)

    return run


def _inlined(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
    body = jit_body(eqn)
    return None if body is None else interpret(body, inputs, _inlined)


def _steep(jaxpr: Jaxpr) -> dict[int, list[bool]]:
    """The equations, by `id`, whose derivative may not be finite, and in which of their operands.

    A product's is in the one operand what the other is: that is looked at where it costs nothing,
    of a number, and where it may be infinite."""
    inputs: list[Any] = [*jaxpr.invars, *jaxpr.constvars]
    data = {v for v in inputs if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
    wild: set[Any] = set()  # data that may be infinite, and selected against
    steep: dict[int, list[bool]] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        operands: list[Any] = [None if isinstance(x, Literal) else x for x in eqn.invars]
        is_data, is_wild = ([x in some for x in operands] for some in (data, wild))
        if not any(is_data):
            continue
        data.update(eqn.outvars)
        number = [x is not None and x.aval.shape == () for x in operands]
        if name == "mul":
            found = [a or b for a, b in zip(is_wild, number, strict=True)][::-1]
        elif name == "div":
            found = [is_data[1] or number[1], True]
        else:
            found = [name in _STEEP] * len(eqn.invars)
        if any(found):
            steep[id(eqn)] = found
        if any(is_wild) if name in _KEEPS else name in _STEEP and any(found):
            wild.update(eqn.outvars)
    return steep


def _with_finite_slopes(eqn: Any, steep: list[bool]) -> Callable[..., Array]:
    """The elementwise operation `eqn`, `steep` in some operands, with its derivative in each."""

    @jax.custom_jvp
    def operation(*xs):
        return eqn.primitive.bind(*xs, **eqn.params)

    @functools.partial(operation.defjvp, symbolic_zeros=True)
    def _(xs, tangents):
        out = operation(*xs)
        tangent = jnp.zeros_like(out)
        for i, dx in enumerate(tangents):
            if isinstance(dx, SymbolicZero):
                continue

            def along(x, i=i):
                return eqn.primitive.bind(*xs[:i], x, *xs[i + 1 :], **eqn.params)

            # Of what it is linear in, a number will do: the slope of `x / y` is of the shape of y.
            linear = eqn.primitive.name == "mul" or (eqn.primitive.name == "div" and i == 0)
            at = jnp.ones((), xs[i].dtype) if linear else xs[i]
            _, slope = jax.jvp(along, (at,), (jnp.ones_like(at),))
            if steep[i]:
                slope = jnp.where(jnp.isfinite(slope), slope, 0)
            tangent = tangent + slope * dx
        return out, tangent

    return operation


def _scan(params: Any, inputs: Sequence[Any]) -> list[Any]:
    fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    run = _run(params["jaxpr"])

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(*inputs[:fixed], *carry, *xs)
        return out[: params["num_carry"]], out[params["num_carry"] :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, list(inputs[fixed:carried]), list(inputs[carried:]), **options)
    return [*carry, *ys]
