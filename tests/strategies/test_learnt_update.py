"""Learnt rules of inner steps: each against its formula, and their meta-gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import same_bits
from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def layer_rates(params):
    return em.rules.LayerRates(params, steps=2)


def network(params):
    return em.rules.UpdateNetwork(key=jax.random.key(1), width=4)


RULES = {
    "Rates": em.rules.Rates,
    "LayerRates": layer_rates,
    "KroneckerBlocks": em.rules.KroneckerBlocks,
    "UpdateNetwork": network,
}


def learnt_update(rule, steps=2, inner=None, outer=None, mode="mixed"):
    loop = em.InnerLoop(inner or optax.sgd(0.1), steps, mode)
    return em.LearntUpdate(MSE, loop, outer or optax.sgd(1.0), rule=rule)


def sine_tasks(num_tasks=3) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, num_tasks))


def moved(tree, size=0.1):
    """`tree` with some noise: away from the identity, where much would look right."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    noisy = [
        x + size * jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        if eqx.is_inexact_array(x)
        else x
        for x in leaves
    ]
    return jax.tree.unflatten(structure, noisy)


def descend(model, support, update, steps):
    """The inner loop written out: `update(k, gradients, model)` is added in step k."""
    for k in range(steps):
        grads = eqx.filter_grad(lambda m: MSE(m, support, None)[0])(model)
        model = eqx.apply_updates(model, update(k, grads, model))
    return model


def meta_gradient(strategy, state, tasks):
    """Plain descent at rate 1 shows it; and the metrics."""
    new, metrics = strategy.outer_update(state, tasks, key=KEY)
    arrays = (eqx.filter(s.model, eqx.is_inexact_array) for s in (state, new))
    return jax.tree.map(jnp.subtract, *arrays), metrics


def written_out(update, steps, tasks):
    """The same by reverse mode through `update(rule, k, gradients, model)`, a Python loop."""

    def objective(meta):
        def one(task):
            end = descend(meta.model, task.support, lambda *a: update(meta.extra, *a), steps)
            return MSE(end, task.query, None)[0]

        return jnp.mean(jax.vmap(one)(tasks))

    return eqx.filter_jit(eqx.filter_grad(objective))


def rates_update(rule, k, grads, model):
    return jax.tree.map(lambda a, g: -0.1 * a * g, rule.rates, grads)


def layer_rates_update(rule, k, grads, model):
    return jax.tree.map(lambda a, g: -0.1 * a[min(k, 1)] * g, rule.rates, grads)


def blocks_update(rule, k, grads, model):
    def one(g, blocks):
        return -0.1 * (blocks[0] @ g @ blocks[1] if g.ndim == 2 else blocks[0] * g)

    return jax.tree.map(one, grads, rule.blocks)


@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("Rates", rates_update),
        ("LayerRates", layer_rates_update),
        ("KroneckerBlocks", blocks_update),
    ],
)
def test_the_rule_written_out(name, update, mode, x64):
    """Three steps: of `LayerRates` with two rows, the last one goes on."""
    strategy, tasks = learnt_update(RULES[name], 3, mode=mode), sine_tasks()
    state = strategy.init(tiny_mlp())
    state = eqx.tree_at(lambda s: s.model, state, moved(state.model))
    ours, _ = meta_gradient(strategy, state, tasks)
    expected = written_out(update, 3, tasks)(state.model)
    assert tree_allclose(ours, eqx.filter(expected, eqx.is_inexact_array), rtol=1e-9, atol=1e-12)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(ours))


def network_update(rule, updates):
    """`UpdateNetwork` in NumPy, its weights as they are: a list of updates of one array, and what
    it makes of them at `x`, a list of values."""
    (w1, b1), (w2, b2) = ((np.asarray(x.weight), np.asarray(x.bias)) for x in rule.network.layers)
    mean, out = 0.0, []
    for k, (u, x) in enumerate(updates):
        mean = 0.9 * mean + 0.1 * u
        m = mean / (1 - 0.9 ** (k + 1))
        scaled = [v / np.sqrt(np.mean(v**2)) for v in (u, m)]
        hidden = np.tanh(np.stack([*scaled, x], axis=-1) @ w1.T + b1)
        ab = hidden @ w2.T + b2
        out.append(np.exp(ab[..., 0]) * u + ab[..., 1] * m)
    return out


def test_the_network_written_out(x64):
    rule = moved(network(None), 0.5)
    rng = np.random.default_rng(1)
    steps = [(rng.standard_normal((2, 3)), rng.standard_normal((2, 3))) for _ in range(3)]
    state = rule.init({"w": jnp.zeros((2, 3))})
    for (u, x), expected in zip(steps, network_update(rule, steps), strict=True):
        updates, state = rule.update({"w": jnp.asarray(u)}, state, {"w": jnp.asarray(x)})
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-10)
    assert int(state[0]) == 3


@pytest.mark.parametrize(
    "name", ["UpdateNetwork", *(pytest.param(n, marks=pytest.mark.slow) for n in list(RULES)[:3])]
)
@pytest.mark.parametrize("inner", [None, pytest.param(optax.adam(0.1), marks=pytest.mark.slow)])
def test_meta_gradients_against_finite_differences(name, inner):
    """In both modes, over three steps, away from the identity."""
    strategy = learnt_update(RULES[name], 3, inner=inner)
    model = moved(strategy.init(tiny_mlp()).model, 0.2)
    check = em.check_meta_gradient(strategy, model, em.tasks.Sinusoid(4, 6).sample(KEY))
    assert check.mixed_vs_reverse < 1e-9
    assert check.mixed_vs_finite_differences < 1e-6


@pytest.mark.parametrize(
    "inner", [pytest.param(optax.sgd(0.1), marks=pytest.mark.slow), optax.adam(0.1)]
)
@pytest.mark.parametrize("name", RULES)
def test_at_first_a_rule_is_the_identity(name, inner, x64):
    """It adapts as MAML with the same inner loop: to the bit, but for the network, whose sum with
    zero the compiler may round otherwise. And differently once the rule has moved."""
    strategy = learnt_update(RULES[name], inner=inner)
    maml = em.MAML(MSE, strategy.inner, optax.sgd(1.0))
    support = em.tasks.Sinusoid(4, 6).sample(KEY).support
    model = strategy.init(tiny_mlp()).model
    expected = maml.inner_adapt(model.model, support)
    rounding = 1e-12 if name == "UpdateNetwork" else 0.0
    ours = strategy.inner_adapt(model, support)
    assert tree_allclose(ours, expected, rtol=rounding, atol=rounding)
    changed = em.MetaParameters(model.model, moved(model.extra))
    assert not tree_allclose(strategy.inner_adapt(changed, support), expected, rtol=1e-3)


@pytest.mark.slow
def test_past_the_steps_trained_with_the_last_row_goes_on(x64):
    strategy, support = learnt_update(layer_rates), em.tasks.Sinusoid(4, 6).sample(KEY).support
    model = moved(strategy.init(tiny_mlp()).model)
    for steps in (1, 2, 4):
        ours = strategy.inner_rollout(model, support, steps=steps).model
        expected = eqx.filter_jit(descend)(
            model.model, support, lambda *a: layer_rates_update(model.extra, *a), steps
        )
        assert tree_allclose(ours, expected, rtol=1e-10)
    values = em.evaluate(strategy, model, sine_tasks(), inner_steps=4).values["loss"]
    assert values.shape == (3, 5) and np.isfinite(values).all()


@pytest.mark.slow
def test_meta_sgd_is_the_rates_as_it_was(x64):
    """To the bit: the rates alone in `extra`, and `optax.chain`, as it was written before."""

    class Before(em.GradientStrategy, em.RolloutStrategy):
        loss: em.Loss
        inner: em.InnerLoop
        optimizer: optax.GradientTransformation

        def meta_model(self, model):
            fast, _ = self.inner.partition(model)
            return em.MetaParameters(model, jax.tree.map(lambda x: jnp.full_like(x, 0.7), fast))

        def inner_rollout(self, model, support, **options):
            times = optax.stateless(
                lambda updates, _: jax.tree.map(lambda r, u: r * u, model.extra, updates)
            )
            rated = optax.chain(self.inner.optimizer, times)
            return self.inner(self.loss, model.model, support, optimizer=rated, **options)

    arguments = MSE, em.InnerLoop(optax.adam(0.1), 2), optax.adam(0.01)
    ours, before = em.MetaSGD(*arguments, rate=0.7), Before(*arguments)
    learnt = em.LearntUpdate(*arguments, rule=lambda params: em.rules.Rates(params, 0.7))
    states = [s.init(tiny_mlp()) for s in (ours, before, learnt)]
    for i in range(2):
        step = [
            s.outer_update(state, sine_tasks(), key=jax.random.key(i))
            for s, state in zip((ours, before, learnt), states, strict=True)
        ]
        states = [state for state, _ in step]
    first, second, third = (jax.tree.leaves(eqx.filter(s, eqx.is_array)) for s in states)
    assert same_bits(first, second) and same_bits(first, third)


class Sign(eqx.Module):
    """A rule of a user's own that wants the loss, and counts."""

    scale: jax.Array

    def init(self, params):
        return jnp.zeros((), jnp.int32)

    def update(self, updates, state, params, *, value):
        factor = self.scale * jnp.log1p(value)
        return jax.tree.map(lambda u: factor * jnp.tanh(u), updates), state + 1


def test_a_rule_of_ones_own(x64):
    strategy = learnt_update(lambda params: Sign(jnp.array(0.5)), 2, inner=optax.sgd(1.0))
    model, task = strategy.init(tiny_mlp()).model, em.tasks.Sinusoid(4, 6).sample(KEY)

    def update(k, grads, model):
        factor = 0.5 * jnp.log1p(MSE(model, task.support, None)[0])
        return jax.tree.map(lambda g: -factor * jnp.tanh(g), grads)

    adaptation = strategy.inner_rollout(model, task.support)
    assert tree_allclose(adaptation.model, descend(model.model, task.support, update, 2))
    assert int(adaptation.opt_state[1]) == 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Rates", marks=pytest.mark.slow),
        pytest.param("LayerRates", marks=pytest.mark.slow),
        "KroneckerBlocks",
        "UpdateNetwork",
    ],
)
def test_it_learns_and_so_does_the_rule(name):
    strategy = learnt_update(RULES[name], outer=optax.adam(0.02))
    tasks, state = sine_tasks(), strategy.init(tiny_mlp())
    update = eqx.filter_jit(lambda s: strategy.outer_update(s, tasks, key=KEY))
    first, losses = state, []
    for _ in range(40):
        state, metrics = update(state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    before, after = (
        jax.tree.leaves(eqx.filter(s.model.extra, eqx.is_array)) for s in (first, state)
    )
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))


def test_nothing_but_the_rule_is_learnt():
    strategy = em.LearntUpdate(
        MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.adamw(0.1), rule=network, learn=lambda m: ()
    )
    state = strategy.init(tiny_mlp())
    new, _ = strategy.outer_update(state, sine_tasks(), key=KEY)
    assert same_bits(new.model.model, state.model.model)
    assert not tree_allclose(new.model.extra, state.model.extra)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("rule", [None, 3, em.rules.UpdateNetwork(key=KEY)])
def test_a_rule_that_is_no_function_is_named(rule):
    with pytest.raises(TypeError, match=r"`LearntUpdate\(rule=...\)`" + THREE_PARTS):
        learnt_update(rule)


@pytest.mark.parametrize("made", [None, jnp.ones(3)])
def test_what_is_no_rule_is_named(made):
    with pytest.raises(TypeError, match=r"`LearntUpdate\(rule=...\)\(params\)`" + THREE_PARTS):
        learnt_update(lambda params: made).init(tiny_mlp())


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda p: em.rules.Rates(p, float("inf")), "Rates(rate"),
        (lambda p: em.rules.LayerRates(p, 0), "LayerRates(steps"),
        (lambda p: em.rules.LayerRates(p, 2, "1"), "LayerRates(rate"),
        (lambda p: em.rules.UpdateNetwork(key=KEY, width=0), "UpdateNetwork(width"),
    ],
)
def test_wrong_arguments_of_rules_are_named(make, argument):
    with pytest.raises(
        ValueError, match=rf"`{argument.replace('(', chr(92) + '(')}=" + THREE_PARTS
    ):
        make(tiny_mlp())
