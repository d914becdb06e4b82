"""MAML++: its objective against the paper's, its phases, its rates."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import equations

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
STEPS = 3
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def sine_tasks(num_tasks: int = 2) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, num_tasks))


@functools.cache  # the same optimizers, hence the same compiled programs
def maml_plus_plus(gradient="mixed", **options):
    inner = em.InnerLoop(optax.sgd(0.1), STEPS, gradient)
    return em.MAMLPlusPlus(em.losses.mse, inner, optax.sgd(1.0), **options)


def at(strategy, step: int, model=None) -> em.TrainState:
    """A state with rates that have been learnt."""
    state = strategy.init(tiny_mlp() if model is None else model)
    leaves, treedef = jax.tree.flatten(state.model.extra)
    keys = jax.random.split(KEY, len(leaves))
    rates = [1 + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    learnt = em.MetaParameters(state.model.model, jax.tree.unflatten(treedef, rates))
    return em.TrainState(jnp.int32(step), learnt, state.opt_state)


def weights_of_the_paper(step: int, anneal: int, steps: int = STEPS) -> np.ndarray:
    """Those of Antoniou et al.: their code, an outer step for an epoch."""
    if step >= anneal:
        return np.eye(steps)[-1]
    lost, floor = step / anneal / steps, 0.03 / steps
    early = max(1 / steps - lost, floor)
    last = min(1 / steps + (steps - 1) * lost, 1 - (steps - 1) * floor)
    return np.array([early] * (steps - 1) + [last])


# The reference: a dict of weights, and a rate for each of them and each inner step.


def squared_error(w, examples):
    x, y = examples
    hidden = jnp.tanh(x @ w["w0"].T + w["b0"][None, :])
    return jnp.sum((hidden @ w["w1"].T + w["b1"][None, :] - y) ** 2) / y.size


def as_dict(model) -> dict:
    layers = model.hidden, model.out
    return {f"w{i}": layer.weight for i, layer in enumerate(layers)} | {
        f"b{i}": layer.bias for i, layer in enumerate(layers)
    }


@functools.partial(jax.jit, static_argnames=["first_order"])
def written_out(learnt, tasks, weights, first_order=False):
    """`(objective, query losses after each step [tasks, K])`."""
    losses = []
    for i in range(len(tasks.support[0])):
        w, rates = learnt
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        row = []
        for k in range(STEPS):
            g = jax.grad(squared_error)(w, task.support)
            g = jax.lax.stop_gradient(g) if first_order else g
            w = {name: w[name] - 0.1 * rates[name][k] * g[name] for name in w}
            row.append(squared_error(w, task.query))
        losses.append(jnp.stack(row))
    losses = jnp.stack(losses)
    return jnp.sum(losses.mean(axis=0) * weights), losses


written_out_gradient = jax.jit(
    jax.value_and_grad(written_out, has_aux=True), static_argnames=["first_order"]
)


def check_against_what_is_written_out(strategy, step, weights, first_order=False):
    state, tasks = at(strategy, step), sine_tasks()
    learnt = as_dict(state.model.model), as_dict(state.model.extra)
    (objective, losses), grads = written_out_gradient(learnt, tasks, weights, first_order)
    new, metrics = strategy.outer_update(state, tasks, key=None)
    moved = jax.tree.map(lambda a, b: a - b, state.model, new.model)
    assert tree_allclose((as_dict(moved.model), as_dict(moved.extra)), grads, rtol=1e-9)
    np.testing.assert_allclose(metrics["objective"], objective, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss"], losses[:, -1].mean(), rtol=1e-9)
    query = [jax.tree.map(lambda x, i=i: x[i], tasks.query) for i in range(2)]
    before = np.mean([squared_error(learnt[0], examples) for examples in query])
    np.testing.assert_allclose(metrics["loss_before"], before, rtol=1e-9)
    assert {f"support_loss/{k}" for k in range(STEPS)} <= metrics.keys()


@pytest.mark.parametrize("gradient", ["mixed", "reverse"])
def test_the_multi_step_loss_and_its_gradient_written_out(gradient, x64):
    """In the weights and in the rates, as the weights of the steps anneal."""
    strategy = maml_plus_plus(gradient, anneal=100)
    for step in (0, 40, 98, 100, 250):
        weights = weights_of_the_paper(step, 100)
        check_against_what_is_written_out(strategy, step, weights)


@pytest.mark.parametrize(("first_order", "anneal"), [(2, 4), (4, 2), (2, 0)])
def test_the_first_outer_steps_are_first_order(first_order, anneal, x64):
    strategy = maml_plus_plus(first_order=first_order, anneal=anneal)
    for step in (1, 3, 5):
        weights = weights_of_the_paper(step, anneal)
        check_against_what_is_written_out(strategy, step, weights, step < first_order)
    throughout = maml_plus_plus("first_order", anneal=anneal)
    ours, expected = (
        s.outer_update(at(s, 1), sine_tasks(), key=None)[0] for s in (strategy, throughout)
    )
    assert tree_allclose(ours.model, expected.model, rtol=1e-12)


def dots(jaxpr) -> int:
    """Matrix products, in calls and loops too."""
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))


def conditionals(jaxpr) -> list:
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "cond"]


def check_phases_are_branches(jaxpr):
    """All products are in conditionals, and those of the exact phase in a branch of their own."""
    branches = [[dots(b.jaxpr) for b in eqn.params["branches"]] for eqn in conditionals(jaxpr)]
    assert dots(jaxpr) == sum(map(sum, branches)) > 0
    first_order, exact, last = map(sum, zip(*branches, strict=True))
    assert last < exact and first_order < exact


def test_one_phase_is_computed_at_a_time():
    strategy = maml_plus_plus(first_order=2, anneal=4)
    update = lambda state, tasks: strategy.outer_update(state, tasks, key=None)  # noqa: E731
    jaxpr = eqx.filter_make_jaxpr(update)(strategy.init(tiny_mlp()), sine_tasks())[0].jaxpr
    check_phases_are_branches(jaxpr)
