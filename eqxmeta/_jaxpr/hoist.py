"""Loop-invariant code motion: what no inner step changes is computed once, before the loop."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import PyTree

from .interpret import evaluate, interpret, jit_body

Step: TypeAlias = Callable[[PyTree, PyTree], PyTree]


def hoist(fun: Step, varying: PyTree, fixed: PyTree) -> tuple[Step, list[Any]]:
    """Evaluate now the part of `fun(varying, fixed)` that does not depend on `varying`.

    Returns `(rest, known)`, with `rest(varying, known)` equal to `fun(varying, fixed)` for every
    `varying` of the same structure, shapes and dtypes. `known` are arrays, those values of the
    evaluated part that `rest` still needs; they are differentiable functions of `fixed`, and of
    whatever `fun` closes over.

    XLA does not do this by itself: what an inner loop computes for its gradient crosses the loop of
    the forward and that of the backward pass, and under `gradient="mixed"` a custom derivative.

    An operation stays in `rest` as a whole if any of its inputs depends on `varying`; a nested
    `jax.jit` is looked into, control flow and `jax.checkpoint` are not. So does one with effects.
    """
    varying_arrays, varying_static = eqx.partition(varying, _is_array)
    arrays, static = eqx.partition(fixed, _is_array)

    def traced(varying_arrays: PyTree, arrays: PyTree) -> PyTree:
        return fun(eqx.combine(varying_arrays, varying_static), eqx.combine(arrays, static))

    closed, shape = jax.make_jaxpr(traced, return_shape=True)(varying_arrays, arrays)
    leaves = [*jax.tree.leaves(varying_arrays), *jax.tree.leaves(arrays)]
    flat = jax.make_jaxpr(lambda *args: interpret(closed, args, _inlined))(*leaves)

    jaxpr = flat.jaxpr
    count = len(jax.tree.leaves(varying_arrays))
    inputs = jaxpr.invars[:count]
    before, after, varies = [], [], set(inputs)
    for eqn in jaxpr.eqns:
        if eqn.effects or any(v in varies for v in eqn.invars if not isinstance(v, Literal)):
            after.append(eqn)
            varies.update(eqn.outvars)
        else:
            before.append(eqn)
    used = [*(v for eqn in after for v in eqn.invars), *jaxpr.outvars]
    needed = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v not in varies))

    values = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    values.update(zip(jaxpr.invars[count:], leaves[count:], strict=True))
    computed = evaluate(before, values, needed)

    def rest(varying: PyTree, known: list[Any]) -> PyTree:
        arrays = jax.tree.leaves(eqx.filter(varying, _is_array))
        values = dict(zip(needed, known, strict=True)) | dict(zip(inputs, arrays, strict=True))
        out = evaluate(after, values, jaxpr.outvars)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rest, computed


def _inlined(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
    body = jit_body(eqn)
    return None if body is None else interpret(body, inputs, _inlined)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)
