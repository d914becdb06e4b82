"""MAML++: its objective against the paper's, its phases, its rates."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import equations
from eqxmeta._task.device_source import Sampled
from eqxmeta._trainer.several import Batch, train_several

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
STEPS = 3
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def sine_tasks(num_tasks: int = 2) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, num_tasks))


def split(tasks: em.Task) -> list[em.Task]:
    return [jax.tree.map(lambda x, i=i: x[i], tasks) for i in range(len(tasks.support[0]))]


@functools.cache  # the same optimizers, hence the same compiled programs
def maml_plus_plus(gradient: Any = "mixed", **options):
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


loss_of = jax.jit(squared_error)


@functools.partial(jax.jit, static_argnames=["first_order"])
def descended(w, rates, support, k, first_order=False):
    g = jax.grad(squared_error)(w, support)
    g = jax.lax.stop_gradient(g) if first_order else g
    return {name: w[name] - 0.1 * rates[name][k] * g[name] for name in w}


@functools.partial(jax.jit, static_argnames=["first_order"])
def written_out(learnt, tasks, weights, first_order=False):
    """`(objective, query losses after each step [tasks, K])`."""
    losses = []
    for task in split(tasks):
        w, rates = learnt
        row = []
        for k in range(STEPS):
            w = descended(w, rates, task.support, k, first_order)
            row.append(squared_error(w, task.query))
        losses.append(jnp.stack(row))
    losses = jnp.stack(losses)
    return jnp.sum(losses.mean(axis=0) * weights), losses


written_out_gradient = jax.jit(
    jax.value_and_grad(written_out, has_aux=True), static_argnames=["first_order"]
)


def check_against_what_is_written_out(strategy, step, weights, first_order=False):
    state, tasks = at(strategy, step), sine_tasks()
    learnt = as_dict(state.model.model), as_dict(state.model.extra.rates)
    (objective, losses), grads = written_out_gradient(learnt, tasks, weights, first_order)
    new, metrics = strategy.outer_update(state, tasks, key=None)
    moved = jax.tree.map(lambda a, b: a - b, state.model, new.model)
    assert tree_allclose((as_dict(moved.model), as_dict(moved.extra.rates)), grads, rtol=1e-9)
    np.testing.assert_allclose(metrics["objective"], objective, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss"], losses[:, -1].mean(), rtol=1e-9)
    before = np.mean([loss_of(learnt[0], task.query) for task in split(tasks)])
    np.testing.assert_allclose(metrics["loss_before"], before, rtol=1e-9)
    assert {f"support_loss/{k}" for k in range(STEPS)} <= metrics.keys()


@pytest.mark.parametrize("gradient", ["mixed", "reverse"])
def test_the_multi_step_loss_and_its_gradient_written_out(gradient, x64):
    """In the weights and in the rates, as the weights of the steps anneal; first order at first."""
    strategy = maml_plus_plus(gradient, anneal=100, first_order=2)
    for step in (0, 40, 98, 100, 250):
        weights = weights_of_the_paper(step, 100)
        check_against_what_is_written_out(strategy, step, weights, first_order=step < 2)


@pytest.mark.slow
@pytest.mark.parametrize(("first_order", "anneal"), [(4, 2), (2, 0), (2, 4)])
def test_the_first_outer_steps_are_first_order(first_order, anneal, x64):
    strategy = maml_plus_plus(first_order=first_order, anneal=anneal)
    for step in (1, 3, 5):
        weights = weights_of_the_paper(step, anneal)
        check_against_what_is_written_out(strategy, step, weights, step < first_order)
    throughout = maml_plus_plus("first_order", anneal=anneal)
    state, tasks = at(strategy, 1), sine_tasks()
    ours, expected = (s.outer_update(state, tasks, key=None)[0] for s in (strategy, throughout))
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


def noisy(model, batch, key):
    x, y = batch
    noise = 0 if key is None else 0.1 * jax.random.normal(key, y.shape)
    return em.losses.mse(model, (x, y + noise), None)


def rates_held(optimizer):
    """An outer optimizer that leaves the rates as they are."""
    labels = lambda learnt: em.MetaParameters("learnt", "held")  # noqa: E731
    return optax.multi_transform({"learnt": optimizer, "held": optax.set_to_zero()}, labels)


def test_switched_off_it_is_maml(x64):
    """Dropout too. To rounding: the gradient in the rates makes XLA fuse the rest otherwise."""
    inner, tasks, adam = em.InnerLoop(optax.sgd(0.1), 2), sine_tasks(), optax.adam(0.1)

    def train(strategy):
        state, metrics = strategy.init(tiny_mlp()), {}
        for step in range(2):
            state, metrics = strategy.outer_update(state, tasks, key=jax.random.key(step))
        kept = metrics.keys() - {"grad_norm", "objective"}
        return state.model, {name: metrics[name] for name in kept}

    maml, expected = train(em.MAML(noisy, inner, adam))
    held = rates_held(adam)
    off, metrics = train(em.MAMLPlusPlus(noisy, inner, held, anneal=0))
    assert tree_allclose(off.model, maml, rtol=1e-11, atol=0)
    assert tree_allclose(metrics, expected, rtol=1e-11, atol=0)


def test_one_phase_is_computed_of_many_seeds():
    strategy = maml_plus_plus(first_order=2, anneal=4)
    state = jax.tree.map(lambda x: jnp.stack([x] * 2), strategy.init(tiny_mlp()))
    source, roots = Sampled(em.tasks.Sinusoid(4, 6), 2), jax.random.split(KEY, 2)
    batch = Batch(strategy, source, roots, jnp.int32(0), jnp.int32(4))
    check_phases_are_branches(eqx.filter_make_jaxpr(train_several)(batch, state)[0].jaxpr)


class Normed(eqx.Module):
    """With statistics of the support set, which every inner step changes."""

    first: eqx.nn.Linear
    norm: em.nn.SupportNorm
    last: eqx.nn.Linear

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def test_statistics_of_the_support_set_at_every_step():
    """The objective is that of an evaluation, which makes a model whole at each step."""
    first, last = (eqx.nn.Linear(1, 1, key=k) for k in jax.random.split(KEY))
    strategy, tasks = maml_plus_plus(anneal=100), sine_tasks()
    state = at(strategy, 40, Normed(first, em.nn.SupportNorm(1), last))
    losses = em.evaluate(strategy, state.model, tasks).values["loss"][0]
    task_loss = eqx.filter_jit(strategy.task_loss)
    objective, metrics = task_loss(state.model, split(tasks)[0], step=state.step, key=None)
    np.testing.assert_allclose(objective, weights_of_the_paper(40, 100) @ losses[1:], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_before"], losses[0], rtol=1e-5)
    assert np.ptp(losses) > 1e-2


def test_more_and_fewer_steps_than_were_trained_with():
    """After the last rate the last goes on; also where a call continues another."""
    strategy, tasks = maml_plus_plus(), sine_tasks()
    model, (task, *_) = at(strategy, 0).model, split(tasks)
    w, rates = as_dict(model.model), as_dict(model.extra.rates)
    expected = [loss_of(w, task.query)]
    for k in (0, 1, 2, 2, 2):
        w = descended(w, rates, task.support, k)
        expected.append(loss_of(w, task.query))
    values = em.evaluate(strategy, model, tasks, inner_steps=5).values["loss"][0]
    np.testing.assert_allclose(values, expected, rtol=1e-5)

    @eqx.filter_jit
    def in_two_parts(model, support):
        part = strategy.inner_rollout(model, support, steps=2)
        begun = em.MetaParameters(part.model, model.extra)
        options = {"opt_state": part.opt_state, "start": 2}
        return strategy.inner_rollout(begun, support, steps=3, **options).model

    assert tree_allclose(as_dict(in_two_parts(model, task.support)), w)


def test_it_learns_and_so_do_the_rates():
    tasks, adam = sine_tasks(4), optax.adam(optax.cosine_decay_schedule(0.1, 60))
    inner = em.InnerLoop(optax.sgd(0.1), 2)
    strategy = em.MAMLPlusPlus(em.losses.mse, inner, adam, anneal=20)
    first = state = strategy.init(tiny_mlp())
    metrics = {}
    for _ in range(60):
        state, metrics = strategy.outer_update(state, tasks, key=None)
    before, after = (em.evaluate(strategy, s.model, tasks).mean()[-1] for s in (first, state))
    assert after < 0.5 * before and metrics["objective"] == metrics["loss"]
    rates = np.stack(jax.tree.leaves(state.model.extra))
    assert rates.shape == (4, 2) and np.all(np.abs(rates - 1) > 1e-2)


def test_rates_of_what_adapts_are_learnt_where_nothing_else_is():
    inner = em.InnerLoop(optax.sgd(0.1), 2, adapt=lambda m: m.out)
    strategy = em.MAMLPlusPlus(em.losses.mse, inner, optax.sgd(0.1), learn=lambda m: ())
    state = strategy.init(tiny_mlp())
    new, _ = strategy.outer_update(state, sine_tasks(), key=None)
    assert tree_allclose(new.model.model, state.model.model, rtol=0, atol=0)
    assert [x.shape for x in jax.tree.leaves(new.model.extra)] == [(2,), (2,)]
    assert all(np.all(x != 1) for x in jax.tree.leaves(new.model.extra))


def test_a_model_without_rates_is_refused():
    with pytest.raises(TypeError, match="not all that `MAMLPlusPlus` learns" + THREE_PARTS):
        maml_plus_plus().inner_adapt(tiny_mlp(), em.tasks.Sinusoid(4, 6).sample(KEY).support)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("argument", ["anneal", "first_order"])
@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_wrong_arguments_are_named(argument, value, error):
    with pytest.raises(error, match=rf"`MAMLPlusPlus\({argument}=...\)`" + THREE_PARTS):
        maml_plus_plus(**{argument: value})


@pytest.mark.slow
def test_the_check_is_of_its_own_objective_late_in_training():
    strategy = em.MAMLPlusPlus(
        em.losses.mse, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0), anneal=10, first_order=5
    )
    model = tiny_mlp()
    task = em.tasks.Sinusoid(4, 6).sample(jax.random.key(0))
    check = em.check_meta_gradient(strategy, strategy.init(model).model, task)
    assert check.ok and check.reverse_vs_finite_differences < 1e-5
