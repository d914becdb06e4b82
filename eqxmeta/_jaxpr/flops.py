"""Floating-point operations of a traced function, counted before anything is compiled."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(fun: Callable[..., Any], *args: Any, loops: bool = True) -> int:
    """Operations of `fun(*args)`; arrays among `args` may be `jax.ShapeDtypeStruct`s.

    Matrix products and convolutions count two operations a multiply-add, everything else that
    computes one operation an element of its result (or, for reductions, of its operand). XLA may
    do with fewer, where it finds that two are the same or not needed.

    A scan counts as often as it iterates, or with `loops=False` once, which tells how large the
    kernels are rather than how long they run. A `while` loop, whose length is not known, counts
    once; of the branches of a `cond` the largest counts.
    """
    dynamic, static = eqx.partition(args, lambda x: hasattr(x, "shape") and hasattr(x, "dtype"))
    closed = jax.make_jaxpr(lambda dynamic: eqx.filter(_call(fun, dynamic, static), eqx.is_array))(
        dynamic
    )
    return flops_of(closed, loops=loops)


def flops_of(closed: ClosedJaxpr, *, loops: bool = True) -> int:
    """`count_flops` of a function that has been traced already."""
    return _count(closed.jaxpr, loops)


def register_flops(primitive: str, count: Callable[[Any], int]) -> None:
    """`count(equation)` are the operations of a primitive that JAX does not have itself."""
    _REGISTERED[primitive] = count


_REGISTERED: dict[str, Callable[[Any], int]] = {}


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation of `jaxpr` and of what it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in _bodies(eqn.params):
            yield from equations(body)


def _call(fun: Callable[..., Any], dynamic: Any, static: Any) -> Any:
    return fun(*eqx.combine(dynamic, static))


def _count(jaxpr: Jaxpr, loops: bool) -> int:
    return sum(flops_of_equation(eqn, loops) for eqn in jaxpr.eqns)


def flops_of_equation(eqn: Any, loops: bool = True) -> int:
    """`flops_of` of one equation of a jaxpr."""
    name = eqn.primitive.name
    if name in _REGISTERED:
        return _REGISTERED[name](eqn)
    bodies = list(_bodies(eqn.params))
    if name == "cond":
        return max(_count(body, loops) for body in bodies)
    if bodies:
        times = eqn.params["length"] if name == "scan" and loops else 1
        return times * sum(_count(body, loops) for body in bodies)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # Every output is a sum over the kernel's positions and the inputs of its group.
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(eqn.outvars[0]) * (math.prod(kernel) // max(outputs, 1))
    if name in _MOVES:
        return 0
    if name.startswith(("reduce_", "cum", "arg")):
        return _size(eqn.invars[0])
    return sum(map(_size, eqn.outvars))


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    # A custom derivative names rules besides the function itself; they are no jaxprs yet.
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


# What moves numbers without computing any.
_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "scatter",
        "concatenate",
        "pad",
        "rev",
        "copy",
        "copy_p",
        "stack",
        "unstack",
        "convert_element_type",
        "bitcast_convert_type",
        "iota",
        "select_n",
        "stop_gradient",
        "split",
        "device_put",
        "optimization_barrier",
        "random_wrap",
        "random_unwrap",
    ]
)
