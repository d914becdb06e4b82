"""`em.nn.fast`: linear layers, convolutions and max-pools of a model replaced, nothing else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqxmeta as em

from ..helpers import tree_allclose


class Model(eqx.Module):
    layers: list
    again: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key):
        conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=key)
        self.layers = [conv, jax.nn.relu, eqx.nn.MaxPool2d(2, 2), eqx.nn.Conv(2, 2, 3, 1, key=key)]
        self.again = conv
        self.head = eqx.nn.Linear(3 * 9, 4, key=key)

    def __call__(self, x):
        for layer in [self.again, *self.layers]:
            x = layer(x)
        return self.head(jnp.ravel(x))


class Own(eqx.nn.Conv2d):
    pass


class OwnLinear(eqx.nn.Linear):
    pass


def test_the_same_arrays_and_results():
    model = Model(jax.random.key(0))
    fast = em.nn.fast(model)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6))
    assert tree_allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)
    kinds = [type(layer) for layer in fast.layers]
    assert kinds[0] is kinds[3] is em.nn.Conv2d and kinds[2] is em.nn.MaxPool2d
    assert fast.again is fast.layers[0]
    assert type(fast) is Model and type(fast.head) is em.nn.Linear
    assert fast.head.weight is model.head.weight and fast.head.bias is model.head.bias
    assert fast.layers[0].weight is model.layers[0].weight
    assert type(model.layers[0]) is eqx.nn.Conv2d


def test_what_is_something_else_stays():
    key = jax.random.key(0)
    tree = [
        eqx.nn.Conv1d(1, 1, 3, key=key),
        eqx.nn.AvgPool2d(2),
        eqx.nn.MaxPool1d(2),
        eqx.nn.ConvTranspose2d(1, 1, 3, key=key),
        Own(1, 1, 3, key=key),
        OwnLinear(1, 1, key=key),
        em.nn.Linear(1, 1, key=key),
        em.nn.fast(eqx.nn.Conv2d(1, 1, 3, key=key)),
        "text",
        None,
    ]
    assert jax.tree.structure(em.nn.fast(tree)) == jax.tree.structure(tree)


def test_linear_layers_inside_of_layers_of_equinox():
    mlp = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))
    fast = em.nn.fast(
        {"mlp": mlp, "wide": [eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(1))]}
    )
    assert all(type(layer) is em.nn.Linear for layer in fast["mlp"].layers)
    assert type(fast["wide"][0].query_proj) is em.nn.Linear
    x = jnp.arange(3.0)
    assert tree_allclose(fast["mlp"](x), mlp(x), rtol=1e-6)


@pytest.mark.parametrize("part", [lambda layer: layer, lambda layer: layer.weight])
def test_what_is_shared_stays_shared(part):
    pair = [eqx.nn.Linear(3, 3, key=key) for key in jax.random.split(jax.random.key(0))]
    shared = eqx.nn.Shared(pair, lambda p: part(p[1]), lambda p: part(p[0]))
    fast = em.nn.fast(shared)
    x, expected = jnp.arange(3.0), shared()
    found = fast()
    assert [type(layer) for layer in found] == [em.nn.Linear] * 2
    assert found[1].weight is found[0].weight
    assert len(jax.tree.leaves(fast)) == len(jax.tree.leaves(shared))
    assert tree_allclose([f(x) for f in found], [e(x) for e in expected], rtol=1e-6)


@pytest.mark.usefixtures("as_users_run_it")
def test_models_of_shapes_and_models_without_arrays():
    shapes = em.nn.fast(eqx.filter_eval_shape(lambda: Model(jax.random.key(0))))
    assert type(shapes.layers[0]) is em.nn.Conv2d
    assert shapes.layers[0].weight.shape == Model(jax.random.key(0)).layers[0].weight.shape
    assert type(em.nn.fast(eqx.nn.MaxPool2d(2))) is em.nn.MaxPool2d
    for wrong in ("model", Model, None, jax.nn.relu):
        with pytest.raises(TypeError, match="is not a model"):
            em.nn.fast(wrong)
