"""In the compiled program the operations of a user's model are on the lines of the user's file."""

import inspect
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em


class Model(eqx.Module):
    body: jax.Array
    head: eqx.nn.Linear

    def __call__(self, x):
        features = jnp.sinh(self.body * x)
        return jnp.tan(self.head(features))


def line_of(text):
    """Where `text` stands in the model above."""
    lines, first = inspect.getsourcelines(Model)
    (offset,) = (i for i, line in enumerate(lines) if text in line)
    return __file__, first + offset


def places(program, operation):
    """File and line of every `operation` in the lowered text: that of the innermost call."""
    defined = dict(re.findall(r"^(#loc\d+) = loc\((.*)\)$", program, re.MULTILINE))

    def innermost(location):
        if at := re.match(r'"([^"]+)":(\d+):', location):
            return at[1], int(at[2])
        return innermost(defined[re.search(r"#loc\d+", location)[0]])

    return {
        innermost(defined[location])
        for location in re.findall(rf" {re.escape(operation)} .* loc\((#loc\d+)\)", program)
    }


@pytest.mark.parametrize("gradient", ["mixed", "reverse"])
@pytest.mark.parametrize("anil", [True, False])
def test_the_users_operations_are_on_the_users_lines(gradient, anil):
    model = Model(jnp.ones(3), eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    # Whatever reads traces has its part: features computed once, square roots, mixed mode.
    adapt = (lambda m: m.head) if anil else None
    inner = em.InnerLoop(optax.adam(0.1), 3, gradient, adapt=adapt)
    strategy = em.MAML(em.losses.mse, inner, optax.sgd(0.1))
    arrays, static = eqx.partition(strategy.init(model), eqx.is_array)
    batch = jnp.ones((4, 5, 3)), jnp.zeros((4, 5, 2))

    def step(arrays, tasks):
        new, _ = strategy.outer_update(eqx.combine(arrays, static), tasks, key=None)
        return eqx.filter(new, eqx.is_array)

    program = jax.jit(step).lower(arrays, em.Task(batch, batch)).as_text(debug_info=True)
    assert places(program, "chlo.sinh") == {line_of("jnp.sinh")}
    assert places(program, "stablehlo.tan") == {line_of("jnp.tan")}
    roots = places(program, "stablehlo.sqrt")
    assert roots and all(Path(optax.__file__).parent in Path(file).parents for file, _ in roots)
