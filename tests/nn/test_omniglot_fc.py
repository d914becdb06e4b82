"""OmniglotFC against the network of MAML's code, written out in plain JAX."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tree_allclose


def plain_loss(model, batch, eps):
    """`forward_fc` of github.com/cbfinn/maml: `contrib.layers.batch_norm` with TensorFlow's
    defaults (epsilon 0.001, a shift `beta`, no scale) and the batch's own statistics."""
    x, y = batch
    for layer, norm in zip(model.layers, model.norms, strict=True):
        x = x @ layer.weight.T + layer.bias[None]
        centred = x - x.mean(axis=0, keepdims=True)
        x = centred / jnp.sqrt((centred**2).mean(axis=0, keepdims=True) + eps) + norm.bias[None]
        x = jnp.maximum(x, 0)
    logits = x @ model.head.weight.T + model.head.bias[None]
    correct = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - correct)


@pytest.mark.parametrize("norm", [pytest.param("batch", marks=pytest.mark.slow), "support"])
def test_the_network_of_the_paper(x64, norm):
    model = em.nn.OmniglotFC(784, 5, norm=norm, key=jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, model)
    rng = np.random.default_rng(0)
    # A tenth of an Omniglot image is ink.
    batch = jnp.asarray((rng.uniform(size=(5, 784)) < 0.1).astype(float)), jnp.arange(5)

    def ours(model, batch):
        return em.losses.cross_entropy(model, batch, None)[0]

    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(ours))(model, batch)
    plain = eqx.filter_jit(eqx.filter_value_and_grad(plain_loss))
    expected, expected_grads = plain(model, batch, 1e-3)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert tree_allclose(grads, expected_grads, rtol=1e-8, atol=1e-14)
    # With the usual epsilon it is another network to train.
    _, others = plain(model, batch, 1e-5)
    assert float(optax.tree.norm(others) / optax.tree.norm(grads)) > 1.5
