"""`InnerLoop(adapt=...)`: what it says adapts, and nothing else; what never changes is computed
once; the meta-gradient is exact all the same."""

from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta._evaluation.curve import adaptation_curve
from eqxmeta._jaxpr.flops import count_flops
from eqxmeta._jaxpr.hoist import hoist
from eqxmeta._meta_gradient import inner_loop as _inner_loop

from ..helpers import TinyMLP, tiny_mlp, tree_allclose

KEY = jax.random.key(0)
RATE, STEPS = 0.1, 3
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def last(model):
    return model.out


def tasks_of(number: int = 2) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, number))


def maml(mode="mixed", adapt=last, steps=STEPS, optimizer=None, loss=em.losses.mse, **options):
    inner = em.InnerLoop(optimizer or optax.sgd(RATE), steps, mode, adapt=adapt, **options)
    return em.MAML(loss, inner, optax.sgd(1.0))


def without_hoist():
    return mock.patch.object(_inner_loop, "hoist", lambda fun, varying, fixed: (fun, fixed))


@eqx.filter_jit
def meta_gradient_by_hand(model: TinyMLP, tasks: em.Task) -> TinyMLP:
    """Plain reverse mode through Python's own loop over steps, features each time anew."""

    def loss(hidden, out, examples):
        x, y = examples
        features = jnp.tanh(x @ hidden.weight.T + hidden.bias[None])
        return jnp.mean((features @ out.weight.T + out.bias[None] - y) ** 2)

    def task_loss(model, task):
        out = model.out
        for _ in range(STEPS):
            grads = eqx.filter_grad(lambda o: loss(model.hidden, o, task.support))(out)
            out = jax.tree.map(lambda p, g: p - RATE * g, out, grads)
        return loss(model.hidden, out, task.query)

    return eqx.filter_grad(lambda m: jnp.mean(jax.vmap(lambda t: task_loss(m, t))(tasks)))(model)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_meta_gradient_against_a_plain_loop(mode, x64):
    model, tasks = jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, (tiny_mlp(), tasks_of())
    )
    strategy = maml(mode)
    state, _ = strategy.outer_update(strategy.init(model), tasks, key=None)
    ours = jax.tree.map(lambda p, q: p - q, model, state.model)
    assert tree_allclose(ours, meta_gradient_by_hand(model, tasks), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_meta_gradient_against_finite_differences(steps):
    """The leaves outside of the filter too: the inner gradients depend on them."""
    strategy = maml(steps=steps, optimizer=optax.adam(RATE), remat=2)
    task = jax.tree.map(lambda x: x[0], tasks_of())
    check = em.check_meta_gradient(strategy, tiny_mlp(), task)
    assert check.mixed_vs_reverse < 1e-10 and check.mixed_vs_finite_differences < 1e-6


def test_first_order_with_a_filter():
    """The query loss's gradient at the adapted parameters; by hand."""
    model, tasks = tiny_mlp(), tasks_of(1)
    task = jax.tree.map(lambda x: x[0], tasks)
    strategy = maml("first_order")
    adapted = strategy.inner_adapt(model, task.support)
    loss = eqx.filter_jit(lambda m: em.losses.mse(m, task.query, None)[0])
    expected = eqx.filter_grad(loss)(adapted)
    state, _ = strategy.outer_update(strategy.init(model), tasks, key=None)
    ours = jax.tree.map(lambda p, q: p - q, model, state.model)
    assert tree_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["FOMAML", "Joint", "Reptile"])
def test_every_strategy_obeys(name):
    inner = em.InnerLoop(optax.adam(RATE), STEPS, adapt=last)
    strategy = getattr(em, name)(em.losses.mse, inner, optax.sgd(0.1))
    support = jax.tree.map(lambda x: x[0], tasks_of()).support
    adapted = strategy.inner_adapt(tiny_mlp(), support)
    assert tree_allclose(adapted.hidden, tiny_mlp().hidden, rtol=0, atol=0)
    assert tree_allclose(adapted, maml(optimizer=optax.adam(RATE)).inner_adapt(tiny_mlp(), support))


def test_only_fast_leaves_have_optimizer_state():
    state = maml(optimizer=optax.adam(RATE)).inner.init(tiny_mlp())
    shapes = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)
    assert shapes == [(1,), (1,), (1, 8), (1, 8)]


def test_all_but_one_part():
    def all_but_out(model):
        return eqx.tree_at(lambda m: m.out, model, None)

    support = jax.tree.map(lambda x: x[0], tasks_of()).support
    adapted = maml(adapt=all_but_out).inner_adapt(tiny_mlp(), support)
    assert tree_allclose(adapted.out, tiny_mlp().out, rtol=0, atol=0)
    assert not tree_allclose(adapted.hidden.weight, tiny_mlp().hidden.weight)


class Twice(eqx.Module):
    """The same array in two places; and a layer that is shared in Equinox's way."""

    first: Array
    second: Array
    name: str = "twice"

    def __call__(self, x):
        return jnp.sum(self.first) * x + jnp.sum(self.second)


def test_of_two_leaves_that_are_the_same_array_the_named_one_adapts():
    array = jnp.ones(2)
    inner = em.InnerLoop(optax.sgd(RATE), STEPS, adapt=lambda m: m.second)
    support = jax.tree.map(lambda x: x[0], tasks_of()).support
    adapted = inner(em.losses.mse, Twice(array, array), support).model
    assert adapted.first is array
    assert not np.allclose(adapted.second, array)


class Tied(eqx.Module):
    shared: eqx.nn.Shared
    last: eqx.nn.Linear

    def __init__(self):
        layers = (eqx.nn.Linear(3, 3, key=KEY), eqx.nn.Linear(3, 3, key=KEY))
        self.shared = eqx.nn.Shared(layers, lambda m: m[1].weight, lambda m: m[0].weight)
        self.last = eqx.nn.Linear(3, 1, key=KEY)

    def __call__(self, x):
        a, b = self.shared()
        return self.last(b(jnp.tanh(a(x))))


def test_a_shared_layer_adapts_as_one():
    x = jax.random.normal(KEY, (5, 3))
    inner = em.InnerLoop(optax.sgd(RATE), 2, adapt=lambda m: m.shared)
    model = eqx.filter_jit(inner)(em.losses.mse, Tied(), (x, x[:, :1])).model
    a, b = model.shared()
    assert tree_allclose(a.weight, b.weight, rtol=0, atol=0)
    assert not tree_allclose(a.weight, Tied().shared()[0].weight)
    assert tree_allclose(model.last, Tied().last, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda m: (), "chooses nothing"),
        (lambda m: m.name, "chooses nothing"),
        (lambda m: jax.tree.map(eqx.is_array, m), r"(?=(.|\n)*eqx\.filter)chooses nothing"),
        (lambda m: 2 * m.first, "not the model's"),
    ],
)
def test_a_filter_that_chooses_nothing_is_refused_before_compilation(adapt, message):
    strategy = maml(adapt=adapt)
    model = Twice(jnp.ones(1), jnp.ones(1))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=False)
    error = pytest.raises(ValueError, match=rf"`InnerLoop\(adapt=...\)`.*{message}" + THREE_PARTS)
    with mock.patch("eqxmeta._loop.dispatch.train_chunk") as compiled, error:
        trainer.fit(model, em.tasks.Sinusoid(4, 6), 1)
    assert not compiled.called


@pytest.mark.parametrize("adapt", ["head", True, eqx.nn.Linear])
@pytest.mark.usefixtures("as_users_run_it")
def test_a_filter_is_a_function(adapt):
    with pytest.raises(TypeError, match=r"`InnerLoop\(adapt=...\)`" + THREE_PARTS):
        em.InnerLoop(optax.sgd(0.1), 1, adapt=adapt)


# What does not depend on the fast weights.


class Noisy(eqx.Module):
    """Dropout in the features: they are others at every step that has a key."""

    mlp: TinyMLP
    dropout: eqx.nn.Dropout

    def __call__(self, x, *, key=None):
        features = jax.jit(lambda x: jax.nn.relu(self.mlp.hidden(x)))(x)
        return self.mlp.out(self.dropout(features, key=key, inference=key is None))


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "dropout"])
@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_hoisting_changes_nothing(mode, key):
    model, tasks = Noisy(tiny_mlp(), eqx.nn.Dropout(0.5)), tasks_of()

    def updated():
        # A loss of its own each time, so that nothing traced is used again.
        strategy = maml(mode, lambda m: m.mlp.out, loss=lambda *args: em.losses.mse(*args))
        return strategy.outer_update(strategy.init(model), tasks, key=key)

    state, metrics = updated()
    with without_hoist():
        expected, expected_metrics = updated()
    assert tree_allclose(state.model, expected.model, rtol=1e-4, atol=1e-6)
    assert tree_allclose(metrics, expected_metrics, rtol=1e-4, atol=1e-6)
    if key is not None:  # each step has a mask of its own
        losses = [float(metrics[f"support_loss/{i}"]) for i in range(STEPS)]
        assert sorted(losses, reverse=True) != losses


@pytest.mark.slow
def test_hoisting_with_minibatches():
    """Rows that differ from step to step: their features do too."""
    inner = em.InnerLoop(optax.sgd(RATE), STEPS, adapt=last)
    data = jax.tree.map(lambda x: x[0], tasks_of()).support
    rows = jnp.array([[0, 1], [2, 3], [1, 2]])
    result = inner(em.losses.mse, tiny_mlp(), data, minibatches=rows)
    model = tiny_mlp()
    for i in range(STEPS):
        batch = jax.tree.map(lambda x, i=i: x[rows[i]], data)
        model = maml(steps=1).inner_adapt(model, batch)
    assert tree_allclose(result.model, model)


@pytest.mark.parametrize(("mode", "factor"), [("mixed", 3.0), ("reverse", 1.8)])
def test_features_are_computed_once(mode, factor):
    """In operations: with a wide body, ten inner steps of the head cost hardly more than one."""
    model = eqx.nn.MLP(1, 1, 32, 3, key=KEY)

    def flops(steps):
        strategy = maml(
            mode, lambda m: m.layers[-1], steps, loss=lambda *args: em.losses.mse(*args)
        )
        update = strategy.outer_update
        return count_flops(lambda s, t: update(s, t, key=KEY), strategy.init(model), tasks_of())

    one, ten = flops(1), flops(10)
    assert ten < 1.3 * one
    with without_hoist():
        assert flops(10) > factor * ten


def test_an_evaluation_computes_features_once():
    """Twenty steps of the head cost hardly more than two, the queries' features included; and the
    curve is what each number of steps gives by itself."""
    model, tasks = eqx.nn.MLP(1, 1, 32, 3, key=KEY), tasks_of()
    strategy = maml("mixed", lambda m: m.layers[-1])

    def flops(steps):
        def curve(model, task):
            return adaptation_curve(strategy, model, task, steps=steps, key=None)

        return count_flops(curve, model, jax.tree.map(lambda x: x[0], tasks))

    assert flops(20) < 1.5 * flops(2)
    with without_hoist():
        assert flops(20) > 3 * flops(2)

    result = em.evaluate(strategy, model, tasks, inner_steps=3)
    for index in range(2):
        support, (x, y) = jax.tree.map(lambda x, i=index: x[i], (tasks.support, tasks.query))
        for steps in (1, 2, 3):
            inner = em.InnerLoop(optax.sgd(RATE), steps, adapt=lambda m: m.layers[-1])
            adapted = em.MAML(em.losses.mse, inner, optax.sgd(1.0)).inner_adapt(model, support)
            expected = np.mean((jax.vmap(adapted)(x) - y) ** 2)
            np.testing.assert_allclose(result.values["loss"][index, steps], expected, rtol=1e-4)


def test_hoist_splits_a_function_where_it_is_told():
    calls = []

    def fun(varying, fixed):
        features = jnp.sin(fixed["x"]) @ fixed["w"]
        jax.debug.callback(lambda: calls.append(1))  # an effect is never moved out of the loop
        return {"out": features * varying, "known": features}

    fixed = {"x": jnp.arange(6.0).reshape(2, 3), "w": jnp.ones((3, 2)), "name": "static"}
    rest, known = hoist(fun, jnp.float32(2.0), fixed)
    assert [k.shape for k in known] == [(2, 2)]
    for varying in (2.0, 5.0):
        expected = np.sin(np.arange(6.0).reshape(2, 3)) @ np.ones((3, 2))
        out = rest(jnp.float32(varying), known)
        np.testing.assert_allclose(out["out"], varying * expected, rtol=1e-5)
        np.testing.assert_allclose(out["known"], expected, rtol=1e-5)
    jax.effects_barrier()
    assert len(calls) == 2
    primitives = {
        eqn.primitive.name for eqn in jax.make_jaxpr(rest)(jnp.float32(1.0), known).jaxpr.eqns
    }
    assert not primitives & {"sin", "dot_general"}
