"""Whether an outer step hands on, untouched, what is not learnt."""

from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from .._errors import explain
from .._jaxpr.interpret import jit_body
from .._model.state import TrainState
from .._strategy.strategy import Strategy, partition_learnt


def check_untouched(strategy: Strategy, state: TrainState, closed: ClosedJaxpr) -> None:
    """Raises `ValueError` if a parameter that `strategy` does not learn is computed anew.

    `closed` is the trace of `strategy.outer_update(state, ...)`: its first inputs and outputs are
    the arrays of the old and the new state."""
    _, rest = partition_learnt(strategy, state.model)
    held = {path for path, _ in _leaves(eqx.filter(rest, eqx.is_inexact_array))}
    jaxpr = closed.jaxpr
    moved = [
        path
        for index, (path, _) in enumerate(_leaves(eqx.filter(state, eqx.is_array)))
        if path.removeprefix(".model") in held and path.startswith(".model")
        if _origin(jaxpr, jaxpr.outvars[index]) is not jaxpr.invars[index]
    ]
    if moved:
        name = type(strategy).__name__
        message = f"`{name}.outer_update` changes parameters that `{name}.learnt` leaves out."
        received = f"new values of {', '.join(path.lstrip('.') for path in moved[:10])}"
        expected = (
            "the array of the old state itself (a sum with zero is another): "
            "`params, rest = eqxmeta.partition_learnt(self, state.model)`, changes of `params` "
            "alone, and `eqx.combine(params, rest)`"
        )
        raise ValueError(explain(message, received, expected))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _origin(jaxpr: Jaxpr, variable: Any) -> Any:
    """The variable of `jaxpr` that `variable` is a copy of, if a `jax.jit` only hands it on."""
    for eqn in jaxpr.eqns:
        body = jit_body(eqn)
        if body is not None and variable in eqn.outvars:
            inner = _origin(body.jaxpr, body.jaxpr.outvars[eqn.outvars.index(variable)])
            if inner in body.jaxpr.invars:
                return _origin(jaxpr, eqn.invars[body.jaxpr.invars.index(inner)])
    return variable
