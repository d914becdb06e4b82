"""`em.nn.Linear` against `eqx.nn.Linear`, and that a `vmap` over examples turns nothing around."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import equations

from ..helpers import tree_allclose

OPTIONS = {
    "plain": dict(in_features=3, out_features=2),
    "no bias": dict(in_features=3, out_features=2, use_bias=False),
    "from a scalar": dict(in_features="scalar", out_features=2),
    "to a scalar": dict(in_features=3, out_features="scalar"),
    "of none": dict(in_features=0, out_features=2),
}


def pair(**options):
    return [cls(**options, key=jax.random.key(0)) for cls in (eqx.nn.Linear, em.nn.Linear)]


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_derivatives_are_those_of_equinox(name, x64):
    theirs, ours = pair(**OPTIONS[name])
    size = OPTIONS[name]["in_features"]
    x = jax.random.normal(jax.random.key(1), (5,) if size == "scalar" else (5, size))
    assert tree_allclose(jax.tree.leaves(ours), jax.tree.leaves(theirs), rtol=0, atol=0)

    def everything(layer):
        def loss(layer, x):
            return jnp.sum(jnp.sin(jax.vmap(layer)(x)))

        def slope(layer, x):
            grads = eqx.filter_grad(lambda both: loss(*both))((layer, x))
            return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(grads))

        grads = eqx.filter_grad(lambda both: slope(*both))((layer, x))
        return jax.vmap(layer)(x), jax.tree.leaves(grads)

    assert tree_allclose(everything(ours), everything(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_equinox_takes_or_refuses_beside_one_example():
    theirs, ours = pair(in_features=3, out_features=2, use_bias=False)
    matrix = jnp.ones((3, 4))
    assert tree_allclose(ours(matrix), theirs(matrix))
    assert tree_allclose(ours(np.ones(3, np.float32)), theirs(jnp.ones(3)))
    for layer in (theirs, ours):
        for wrong in (jnp.ones(4), jnp.ones((4, 3)), jnp.float32(1)):
            with pytest.raises((TypeError, ValueError)):
                layer(wrong)
    with pytest.raises(ValueError, match="scalar shape"):
        em.nn.Linear("scalar", 2, key=jax.random.key(0))(jnp.ones(1))


def transposes(model, x):
    def loss(model, x):
        return em.losses.mse(model, (x, jnp.zeros((len(x), 2))), None)[0]

    jaxpr = jax.make_jaxpr(lambda x: (loss(model, x), jax.grad(loss, 1)(model, x)))(x).jaxpr
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "transpose"]


def test_a_dense_network_needs_no_transposes():
    model, x = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0)), jnp.ones((7, 3))
    assert transposes(model, x)  # else this tests nothing
    assert not transposes(em.nn.fast(model), x)


def test_a_checkpoint_of_either_layer_loads_into_the_other(tmp_path):
    model, other = (eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(i)) for i in range(2))
    em.save(tmp_path / "plain.eqxmeta", model)
    loaded = em.load(tmp_path / "plain.eqxmeta", em.nn.fast(other))
    assert type(loaded.layers[0]) is em.nn.Linear
    em.save(tmp_path / "fast.eqxmeta", loaded)
    again = em.load(tmp_path / "fast.eqxmeta", other)
    assert type(again.layers[0]) is eqx.nn.Linear
    assert tree_allclose(again, model, rtol=0, atol=0)


def test_anil_finds_the_head_of_a_fast_model():
    model = em.nn.fast(eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0)))
    anil = em.ANIL(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    adapted = anil.inner_adapt(model, (jnp.ones((4, 3)), jnp.zeros((4, 2))))
    pairs = zip(adapted.layers, model.layers, strict=True)
    same = [bool(jnp.array_equal(a.weight, b.weight)) for a, b in pairs]
    assert same == [True, True, False]
