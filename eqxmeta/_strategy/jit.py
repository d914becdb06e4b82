"""Programs that are compiled for a strategy, and released with it."""

import functools
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .strategy import Strategy

_ERROR_IF = re.compile(r"_EquinoxRuntimeError: (.*?)\s*-{20}", re.DOTALL)


class StrategyJit:
    """`eqx.filter_jit` of `fun(strategy, ...)`, or of `fun(job, ...)` with a field `job.strategy`;
    but what is compiled for a strategy is kept only as long as that strategy.

    An optax optimizer is made of new functions every time, and these are static parts of a program:
    a sweep over rates would pile up programs that are never called again, for JAX keeps them as
    long as the function that it compiled. So each strategy has a function of its own. Equal
    strategies that exist at the same time share it.

    - `donate`: the arguments after the first are consumed.
    """

    def __init__(self, fun: Callable[..., Any], donate: bool):
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._donate = donate
        self._programs: dict[int, tuple[weakref.ref[Strategy], Any]] = {}  # by the strategy's id

    def __call__(self, first: Any, *rest: Any) -> Any:
        program, arguments = self._prepare(first, *rest)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
                arrays, static = program(*arguments)
            return eqx.combine(jax.block_until_ready(arrays), static.value)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if told := _ERROR_IF.search(str(error)):
                # Of the user's own `eqx.error_if`, without all that JAX has to say.
                raise eqx.EquinoxRuntimeError(told[1]) from None
            raise

    def lower(self, first: Any, *rest: Any) -> jax.stages.Lowered:
        program, arguments = self._prepare(first, *rest)
        return program.lower(*arguments)

    def _prepare(self, first: Any, *rest: Any) -> tuple[Any, tuple[Any, ...]]:
        """The program, and its arguments: what is static, and the arrays."""
        strategy = first if isinstance(first, Strategy) else first.strategy
        key = id(strategy)
        if key not in self._programs:
            program = self._of_an_equal(strategy) or self._new()
            self._programs[key] = weakref.ref(strategy), program
            weakref.finalize(strategy, self._programs.pop, key).atexit = False
        (arrays, static), (other_arrays, other_static) = map(_split, (first, rest))
        return self._programs[key][1], ((static, other_static), arrays, other_arrays)

    def _of_an_equal(self, strategy: Strategy) -> Any:
        for reference, program in list(self._programs.values()):
            other = reference()
            if other is not None and _split(other)[1] == _split(strategy)[1]:
                return program
        return None

    def _new(self) -> Any:
        def fun(static: Any, arrays: Any, other_arrays: Any) -> Any:
            first, rest = map(_join, (arrays, other_arrays), static)
            out_arrays, out_static = eqx.partition(self._fun(first, *rest), eqx.is_array)
            return out_arrays, _Static(out_static)

        fun.__name__ = fun.__qualname__ = self.__name__  # type: ignore
        return jax.jit(fun, static_argnums=0, donate_argnums=(2,) if self._donate else ())


class _Static(eqx.Module):
    value: Any = eqx.field(static=True)


def _split(tree: Any) -> tuple[list[Any], Any]:
    """The arrays of `tree`, and the rest: something that can be hashed."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
    return arrays, (structure, tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves))


def _join(arrays: list[Any], static: Any) -> Any:
    structure, others = static
    leaves = [y if x is None else x for x, y in zip(arrays, others, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def strategy_jit(*, donate: bool = False) -> Callable[[Callable[..., Any]], StrategyJit]:
    """`StrategyJit` as a decorator."""
    return lambda fun: StrategyJit(fun, donate)
