"""The compiled outer step of a strategy, by itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax

import eqxmeta as em


class Step(NamedTuple):
    run: Callable[[], Any]
    temp_bytes: int  # beside arguments and results


def compile_step(strategy: em.Strategy, model: Any, tasks: em.Task) -> Step:
    state = strategy.init(model)
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays, tasks):
        new = strategy.outer_update(eqx.combine(arrays, static), tasks, key=None)
        return eqx.filter(new, eqx.is_array)

    compiled = jax.jit(step).lower(arrays, tasks).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Step(lambda: compiled(arrays, tasks), int(memory))
