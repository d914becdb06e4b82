"""Meta-Curvature: identities are MAML, and the rule of a convolution written out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import same_bits
from ..helpers import tiny_mlp, tree_allclose
from .test_learnt_update import blocks_update, descend, moved, sine_tasks

KEY = jax.random.key(0)
MSE = em.losses.mse


class Net(eqx.Module):
    """A convolution and a linear layer: `[2, 4, 4] -> [3]`."""

    conv: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self):
        self.conv = eqx.nn.Conv2d(2, 3, (2, 3), key=KEY)
        self.out = eqx.nn.Linear(18, 3, key=KEY)

    def __call__(self, x):
        return self.out(jnp.tanh(self.conv(x)).ravel())


def test_identity_blocks_are_maml(x64):
    """To the bit while it adapts; in the outer step, whose programs differ, to rounding."""
    arguments = MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(0.1)
    ours, maml, tasks = em.MetaCurvature(*arguments), em.MAML(*arguments), sine_tasks()
    state, expected = ours.init(tiny_mlp()), maml.init(tiny_mlp())
    support = jax.tree.map(lambda x: x[0], tasks).support
    adapted = maml.inner_adapt(expected.model, support)
    assert same_bits(ours.inner_adapt(state.model, support), adapted)
    changed = em.MetaParameters(state.model.model, moved(state.model.extra))
    assert not tree_allclose(ours.inner_adapt(changed, support), adapted, rtol=1e-3)
    new, _ = ours.outer_update(state, tasks, key=KEY)
    wanted, _ = maml.outer_update(expected, tasks, key=KEY)
    assert tree_allclose(new.model.model, wanted.model, rtol=1e-12, atol=1e-14)
    assert not tree_allclose(new.model.extra, state.model.extra)


def test_blocks_of_every_kind_of_array():
    rule = em.rules.KroneckerBlocks(Net())
    shapes = jax.tree.map(lambda x: x.shape, (rule.blocks.conv.weight, rule.blocks.out.weight))
    assert shapes == ([(3, 3), (2, 2), (6, 6)], [(3, 3), (18, 18)])
    assert [x.shape for x in rule.blocks.conv.bias + rule.blocks.out.bias] == [(3, 1, 1), (3,)]


def test_a_convolution_written_out(x64):
    """Sums over single numbers."""
    rule = moved(em.rules.KroneckerBlocks(eqx.filter(Net(), eqx.is_inexact_array)))
    u = moved(jax.tree.map(jnp.zeros_like, eqx.filter(Net(), eqx.is_inexact_array)), 1.0)
    ours, _ = rule.update(u, rule.init(u))
    out, into, kernel = map(np.asarray, rule.blocks.conv.weight)
    g = np.asarray(u.conv.weight).reshape(3, 2, 6)
    expected = np.zeros_like(g)
    for index in np.ndindex(g.shape):
        for o, i, f in np.ndindex(g.shape):
            weight = out[index[0], o] * into[i, index[1]] * kernel[f, index[2]]
            expected[index] += weight * g[o, i, f]
    np.testing.assert_allclose(ours.conv.weight, expected.reshape(3, 2, 2, 3), rtol=1e-10)
    np.testing.assert_allclose(ours.conv.bias, rule.blocks.conv.bias[0] * u.conv.bias, rtol=1e-12)
    assert tree_allclose(ours.out, blocks_of(rule.blocks.out, u.out))


def blocks_of(blocks, u):
    weight = blocks.weight[0] @ u.weight @ blocks.weight[1]
    return eqx.tree_at(lambda x: (x.weight, x.bias), u, (weight, blocks.bias[0] * u.bias))


def test_adapts_by_the_formula_and_evaluates_longer(x64):
    strategy = em.MetaCurvature(MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(0.1))
    model, tasks = moved(strategy.init(tiny_mlp()).model), sine_tasks()
    support = jax.tree.map(lambda x: x[0], tasks).support
    expected = eqx.filter_jit(descend)(
        model.model, support, lambda *a: blocks_update(model.extra, *a), 4
    )
    assert tree_allclose(strategy.inner_rollout(model, support, steps=4).model, expected)
    values = em.evaluate(strategy, model, tasks, inner_steps=4).values["loss"]
    query = jax.tree.map(lambda x: x[0], tasks).query
    np.testing.assert_allclose(values[0, 4], MSE(expected, query, None)[0], rtol=1e-9)


@pytest.mark.slow
def test_meta_gradient_of_convolutions_against_finite_differences():
    strategy = em.MetaCurvature(MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(0.1))
    x = jax.random.normal(KEY, (2, 5, 2, 4, 4))
    y = jax.random.normal(KEY, (2, 5, 3))
    task = em.Task((x[0], y[0]), (x[1], y[1]))
    check = em.check_meta_gradient(strategy, moved(strategy.init(Net()).model), task)
    assert check.mixed_vs_reverse < 1e-10 and check.mixed_vs_finite_differences < 1e-6
