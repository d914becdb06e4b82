"""A traced function, evaluated equation by equation, so that some may be treated in another way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

# `rule(equation, inputs)`: the outputs, or `None` for those of the equation itself.
Rule = Callable[[Any, Sequence[Any]], Sequence[Any] | None]


def interpret(closed: ClosedJaxpr, args: Sequence[Any], rule: Rule) -> list[Any]:
    """What `closed` computes of `args`, with the equations that `rule` replaces."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    evaluate(jaxpr.eqns, values, rule)
    return read(jaxpr.outvars, values)


def evaluate(
    equations: Iterable[Any], values: dict[Any, Any], rule: Rule = lambda eqn, inputs: None
) -> None:
    """Add to `values`, by variable, what `equations` compute."""
    for eqn in equations:
        inputs = read(eqn.invars, values)
        with _as_traced(eqn):
            if (outputs := rule(eqn, inputs)) is None:
                outputs = bind(eqn, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))


def bind(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of the equation itself, for other `inputs`."""
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


@contextmanager
def _as_traced(eqn: Any) -> Iterator[None]:
    """Under what surrounded the equation when it was traced: settings such as
    `jax.threefry_partitionable`, on which the numbers depend, and `jax.named_scope`s."""
    scope = str(eqn.source_info.name_stack)
    with eqn.ctx.manager:
        if not scope:
            yield
            return
        with jax.named_scope(scope):
            yield


def read(atoms: Iterable[Any], values: dict[Any, Any]) -> list[Any]:
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]


def jit_body(eqn: Any) -> ClosedJaxpr | None:
    """The body of a nested `jax.jit`, which may as well be inlined."""
    body = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
    return body if isinstance(body, ClosedJaxpr) else None
