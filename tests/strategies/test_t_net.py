"""T-Net: layers inserted by hand, whose transformations do not adapt, are the same network."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import same_bits
from ..helpers import TinyMLP, tiny_mlp, tree_allclose
from .test_learnt_update import moved, sine_tasks

KEY = jax.random.key(0)
MSE = em.losses.mse
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


class Inserted(eqx.Module):
    """A layer, and its transformation as a layer of its own."""

    layer: eqx.Module
    matrix: jax.Array

    def __call__(self, x, *, key=None):
        return jnp.tensordot(self.matrix, self.layer(x), 1)


def inserted(meta, layers) -> eqx.Module:
    """`meta` as the network of the paper: `layers(model)` are those in order."""
    pairs = zip(layers(meta.model), meta.extra, strict=True)
    return eqx.tree_at(layers, meta.model, [Inserted(*pair) for pair in pairs])


def both(m):
    return [m.hidden, m.out]


def without_matrices(model):
    return [x.layer for x in both(model)]


def strategies(steps=2, mode="mixed", optimizer=None):
    outer = optax.sgd(1.0)
    inner = optimizer or optax.sgd(0.1)
    ours = em.TNet(MSE, em.InnerLoop(inner, steps, mode), outer)
    by_hand = em.MAML(MSE, em.InnerLoop(inner, steps, "reverse", adapt=without_matrices), outer)
    return ours, by_hand


@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_the_network_with_layers_inserted(mode, x64):
    """MAML on it, in which all but the transformations adapts: the outer step and the metrics."""
    (ours, maml), tasks = strategies(3, mode), sine_tasks()
    state = ours.init(tiny_mlp())
    state = eqx.tree_at(lambda s: s.model, state, moved(state.model))
    network = maml.init(inserted(state.model, both))
    new, metrics = ours.outer_update(state, tasks, key=KEY)
    expected, wanted = maml.outer_update(network, tasks, key=KEY)
    assert tree_allclose(metrics, wanted, rtol=1e-9)
    layers = [x.layer for x in both(expected.model)]
    assert tree_allclose(both(new.model.model), layers, rtol=1e-9, atol=1e-12)
    matrices = [x.matrix for x in both(expected.model)]
    assert tree_allclose(new.model.extra, matrices, rtol=1e-9, atol=1e-12)
    assert not tree_allclose(new.model.extra, state.model.extra, rtol=1e-3)


def test_a_step_moves_along_the_metric(x64):
    """`T W` by `T Tᵀ` times its own gradient: section 3.1."""
    ours, _ = strategies(1)
    support = jax.tree.map(lambda x: x[0], sine_tasks()).support
    model = moved(ours.init(tiny_mlp()).model)
    before = ours.unadapted(model)
    grads = eqx.filter_grad(lambda m: MSE(m, support, None)[0])(before)
    adapted = ours.inner_adapt(model, support)
    assert isinstance(adapted, TinyMLP)
    for t, w, g, after in zip(model.extra, both(before), both(grads), both(adapted), strict=True):
        np.testing.assert_allclose(after.weight, w.weight - 0.1 * t @ t.T @ g.weight, rtol=1e-10)
        np.testing.assert_allclose(after.bias, w.bias - 0.1 * t @ t.T @ g.bias, rtol=1e-10)


def test_with_identities_it_is_maml(x64):
    """To the bit while it adapts; in the outer step, whose programs differ, to rounding."""
    ours, _ = strategies()
    maml, tasks = em.MAML(MSE, ours.inner, ours.optimizer), sine_tasks()
    state, expected = ours.init(tiny_mlp()), maml.init(tiny_mlp())
    support = jax.tree.map(lambda x: x[0], tasks).support
    adapted = maml.inner_adapt(expected.model, support)
    assert same_bits(ours.inner_adapt(state.model, support), adapted)
    changed = em.MetaParameters(state.model.model, moved(state.model.extra))
    assert not tree_allclose(ours.inner_adapt(changed, support), adapted, rtol=1e-3)
    new, _ = ours.outer_update(state, tasks, key=KEY)
    wanted, _ = maml.outer_update(expected, tasks, key=KEY)
    assert tree_allclose(new.model.model, wanted.model, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("conv", [eqx.nn.Conv2d, em.nn.Conv2d])
def test_of_convolutions_channels_are_transformed(conv):
    """Before its activation the layer's output, at every place; layers without bias too."""
    net = eqx.nn.Sequential(
        [
            conv(2, 2, 1, groups=2, key=KEY),  # left as it is
            conv(2, 4, 3, key=KEY),
            eqx.nn.Lambda(lambda x: jnp.tanh(x).ravel()),
            eqx.nn.Linear(16, 3, use_bias=False, key=KEY),
        ]
    )
    strategy = em.TNet(MSE, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    meta = moved(strategy.init(net).model)
    assert [x.shape for x in meta.extra] == [(4, 4), (3, 3)]
    expected = inserted(meta, lambda m: [m.layers[1], m.layers[3]])
    x = jax.random.normal(KEY, (2, 4, 4))
    np.testing.assert_allclose(strategy.unadapted(meta)(x), expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [None, lambda m: m.out])
def test_meta_gradient_against_finite_differences(adapt):
    inner = em.InnerLoop(optax.adam(0.1), 2, adapt=adapt)
    strategy = em.TNet(MSE, inner, optax.sgd(1.0))
    model = moved(strategy.init(tiny_mlp()).model)
    check = em.check_meta_gradient(strategy, model, em.tasks.Sinusoid(4, 6).sample(KEY))
    assert check.mixed_vs_reverse < 1e-10 and check.mixed_vs_finite_differences < 1e-6


def test_an_evaluation_measures_what_predicts(x64):
    ours, _ = strategies()
    model, tasks = moved(ours.init(tiny_mlp()).model), sine_tasks()
    values = em.evaluate(ours, model, tasks, inner_steps=3).values["loss"]
    task = jax.tree.map(lambda x: x[0], tasks)
    for steps in (0, 3):
        adapted = ours.inner_rollout(model, task.support, steps=steps).model
        np.testing.assert_allclose(values[0, steps], MSE(adapted, task.query, None)[0], rtol=1e-9)


def test_a_model_without_layers_is_refused():
    class Line(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return self.w * x

    with pytest.raises(ValueError, match="`TNet` transforms" + THREE_PARTS):
        strategies()[0].init(Line(jnp.ones(1)))
    with pytest.raises(TypeError, match="`TNet` learns" + THREE_PARTS):
        strategies()[0].unadapted(tiny_mlp())
