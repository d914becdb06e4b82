"""A jaxpr interpreter with per-equation overrides."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Literal

# `rule(equation, inputs)`: the outputs, or `None` for those of the equation itself.
Rule = Callable[[Any, Sequence[Any]], Sequence[Any] | None]


def interpret(closed: ClosedJaxpr, args: Sequence[Any], rule: Rule) -> list[Any]:
    """What `closed` computes of `args`, with the equations that `rule` replaces."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    return evaluate(jaxpr.eqns, values, jaxpr.outvars, rule)


def evaluate(
    equations: Sequence[Any],
    values: dict[Any, Any],
    results: Sequence[Any],
    rule: Rule = lambda eqn, inputs: None,
) -> list[Any]:
    """The values of `results`, variables of `equations` or of `values`, which has those of the
    inputs by variable, and is used up: each value goes after its last use."""
    last = {v: i for i, eqn in enumerate(equations) for v in _variables(eqn)}
    last.update(dict.fromkeys(_no_literals(results)))
    for index, eqn in enumerate(equations):
        inputs = _read(eqn.invars, values)
        with _as_traced(eqn):
            if (outputs := rule(eqn, inputs)) is None:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
        del inputs, outputs
        for variable in _variables(eqn):
            if last[variable] == index:
                values.pop(variable, None)
    return _read(results, values)


@contextlib.contextmanager
def _as_traced(eqn: Any) -> Iterator[None]:
    """Under what surrounded the equation when it was traced: settings such as
    `jax.threefry_partitionable`, on which the numbers depend, `jax.named_scope`s, and the line of
    the user's program, which profiles and errors name."""
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    with eqn.ctx.manager, source_info_util.user_context(source.traceback, name_stack=names):
        yield


def _read(atoms: Iterable[Any], values: dict[Any, Any]) -> list[Any]:
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]


def _variables(eqn: Any) -> list[Any]:
    return _no_literals([*eqn.invars, *eqn.outvars])


def _no_literals(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def jit_body(eqn: Any) -> ClosedJaxpr | None:
    """The body of a nested `jax.jit` that may as well be inlined: one that asks for nothing, such
    as shardings or options of the compiler, that its operations do not say themselves."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    body, plain = eqn.params.get("jaxpr"), _plain_jit()
    asks = any(not set(eqn.params.get(name, ())) <= set(plain.get(name, ())) for name in _ASKS)
    return body if isinstance(body, ClosedJaxpr) and not asks else None


_ASKS = ("in_shardings", "out_shardings", "in_layouts", "out_layouts", "compiler_options_kvs")


@functools.cache
def _plain_jit() -> dict[str, Any]:
    """The parameters of a `jax.jit` without options; JAX has no public name for some."""
    with jax.disable_jit(False):
        (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x + 1))(0.0).jaxpr.eqns
    return eqn.params
