"""Images channels last in memory, in models that are written channels first."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from .interpret import Rule, bind, interpret, jit_body

# Those of which each element of the result is one of the operands' elements at the same place.
# fmt: off
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
}
_REDUCTIONS = {
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
}
# fmt: on
_JAX = os.path.join(os.path.dirname(jax.__file__), "")


class _Moved(NamedTuple):
    """A value whose axis `k` is axis `order[k]` of `array`: transposed, but not yet in memory."""

    array: Array
    order: tuple[int, ...]


def channels_last(closed: ClosedJaxpr, args: Sequence[Array], rule: Rule) -> list[Array]:
    """What `closed` computes of `args`, its transpositions put off as long as nothing needs them.

    A layer of `eqxmeta.nn` gets an image channels first, works channels last and returns it
    channels first again. What stands between two of them (a bias, a normalisation, an activation)
    is computed on the array as it lies, and the two transpositions meet and vanish. The compiler
    would not find that: it fuses each of them into loops that walk through memory in strides of a
    whole image, a third of the time of a first-order step of Conv-4.
    """

    def moved(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
        if (body := jit_body(eqn)) is not None:
            return interpret(body, inputs, moved)
        if eqn.primitive.name == "transpose":
            return [_transpose(inputs[0], eqn.params["permutation"])]
        if any(isinstance(x, _Moved) for x in inputs):
            if (outputs := _as_it_lies(eqn, inputs)) is not None:
                return outputs
            inputs = [_in_memory(x) for x in inputs]
            outputs = rule(eqn, inputs)
            return bind(eqn, inputs) if outputs is None else outputs
        return rule(eqn, inputs)

    return [_in_memory(x) for x in interpret(closed, args, moved)]


def has_primitive(closed: ClosedJaxpr, name: str) -> bool:
    """Whether `name` is called, outside of loops and the like."""
    return any(
        eqn.primitive.name == name if (body := jit_body(eqn)) is None else has_primitive(body, name)
        for eqn in closed.jaxpr.eqns
    )


def _as_it_lies(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
    """The result computed on the arrays as they lie in memory, if it can be."""
    name = eqn.primitive.name
    order = next(x.order for x in inputs if isinstance(x, _Moved))
    if name in _REDUCTIONS and eqn.params.get("out_sharding") is None:
        return [_reduce(eqn, inputs[0])]
    if name in _ELEMENTWISE and all(jnp.ndim(x) in (0, len(order)) for x in map(_array, inputs)):
        arrays = [_lying(x, order) for x in inputs]
        return [_Moved(out, order) for out in bind(eqn, arrays)]
    if (activation := _activation(eqn)) is not None:
        return [_Moved(activation(_array(inputs[0])), order)]
    return None


def _activation(eqn: Any) -> Callable[[Array], Array] | None:
    """The function of `jax.nn`, such as `relu`, if that is what has been called. It is called anew:
    the derivative in the equation is of the shape of the transposed array."""
    if eqn.primitive.name != "custom_jvp_call" or len(eqn.invars) != 1:
        return None
    body = eqn.params["call_jaxpr"]
    name, _, source = (body.jaxpr.debug_info.func_src_info or "").partition(" at ")
    # Another function's rule may be anything, whatever its name.
    if not source.startswith(_JAX) or not _all_elementwise(body):
        return None
    return getattr(jax.nn, name, None)


def _all_elementwise(body: ClosedJaxpr) -> bool:
    return all(
        eqn.primitive.name in _ELEMENTWISE
        if (inner := jit_body(eqn)) is None
        else _all_elementwise(inner)
        for eqn in body.jaxpr.eqns
    )


def _reduce(eqn: Any, x: _Moved) -> Any:
    axes = eqn.params["axes"]
    params = {**eqn.params, "axes": tuple(sorted(x.order[a] for a in axes))}
    kept = [lies for axis, lies in enumerate(x.order) if axis not in axes]
    return _moved(eqn.primitive.bind(x.array, **params), [sorted(kept).index(k) for k in kept])


def _transpose(x: Any, permutation: Sequence[int]) -> Any:
    if isinstance(x, _Moved):
        return _moved(x.array, [x.order[p] for p in permutation])
    return _moved(x, permutation)


def _moved(array: Array, order: Sequence[int]) -> Any:
    order = tuple(int(k) for k in order)
    return array if order == tuple(range(len(order))) else _Moved(array, order)


def _array(x: Any) -> Any:
    return x.array if isinstance(x, _Moved) else x


def _in_memory(x: Any) -> Any:
    return jax.lax.transpose(x.array, x.order) if isinstance(x, _Moved) else x


def _lying(x: Any, order: tuple[int, ...]) -> Any:
    """The array of `x`, transposed so that its axes lie in `order`."""
    if isinstance(x, _Moved) and x.order == order:
        return x.array
    if jnp.ndim(_array(x)) == 0:
        return x
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jax.lax.transpose(_in_memory(x), inverse)
