"""Models with convolutions are computed with the channels last, to the same result as by `vmap`."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp

import eqxmeta as em
from eqxmeta._jaxpr.examples_first import examples_first
from eqxmeta._jaxpr.flops import equations

from ..helpers import tree_allclose


@jax.custom_jvp
def relu(x):
    """Not `jax.nn.relu`: the derivative is weighted by the place in the array."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return relu(x), t * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)


class Net(eqx.Module):
    """Between two convolutions, all that needs care: activations of `jax.nn`, one with a rule of
    its own, reductions over channels and over positions, a skip connection, a loop, a broadcast."""

    first: em.nn.Conv2d
    second: em.nn.Conv2d
    norm: eqx.nn.GroupNorm
    pool: em.nn.MaxPool2d
    place: jax.Array

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.first = em.nn.Conv2d(2, 4, 3, padding=1, key=keys[0])
        self.second = em.nn.Conv2d(4, 4, 3, padding=1, groups=2, key=keys[1])
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.pool = em.nn.MaxPool2d(2, 2)
        self.place = jax.random.normal(keys[2], (1, 6, 5))

    def __call__(self, x):
        y = jax.nn.relu(self.norm(self.first(x)))
        y = relu(y + self.place) * jax.nn.softmax(y, axis=0)
        y = y - jnp.max(y, axis=(0, 2), keepdims=True) + jnp.mean(y, axis=1, keepdims=True)
        y = jnp.where(y > 0, jax.nn.gelu(y), 0.1) + jnp.transpose(y, (2, 1, 0))[:1, :, :4].T
        y = jax.lax.fori_loop(0, 2, lambda i, y: y * jnp.cos(y), y)
        y = jnp.concatenate([y[:2], self.second(y)[2:]])
        y = jax.jit(lambda y: jax.nn.softplus(y) + jnp.clip(y, -1.0, 1.0))(y)
        return self.pool(y), jnp.sum(y, axis=(1, 2)), y.reshape(-1)[:7]


def test_the_same_as_by_vmap(x64):
    arrays, static = eqx.partition(Net(), eqx.is_array)
    arrays = jax.tree.map(lambda a: a.astype(jnp.float64), arrays)
    x = jax.random.normal(jax.random.key(1), (3, 2, 6, 5), jnp.float64)

    def by(predict):
        def total(arrays, x):
            out = predict(eqx.combine(arrays, static), x)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out)), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(arrays, x)

    expected = by(lambda model, x: jax.vmap(model)(x))
    assert tree_allclose(by(em.losses.predict), expected, rtol=1e-12, atol=1e-12)


def test_an_activation_of_another_package_keeps_its_rule():
    # As one in a package `jaxother`, installed beside JAX.
    source = os.path.dirname(jax.__file__) + "other/nn.py"
    names = {"jax": jax, "jnp": jnp}
    exec(compile(OTHER, source, "exec"), names)
    conv = em.nn.Conv2d(1, 2, 1, key=jax.random.key(0))

    def slope(predict):
        return jax.jit(jax.grad(lambda x: jnp.sum(predict(lambda x: names["relu"](conv(x)), x))))(x)

    x = jnp.ones((1, 1, 3, 2))
    by_vmap = slope(lambda model, x: jax.vmap(model)(x))
    assert tree_allclose(slope(em.losses.predict), by_vmap, rtol=1e-6)


OTHER = """
@jax.custom_jvp
def relu(x):
    return jnp.maximum(x, 0)

@relu.defjvp
def _(primals, tangents):
    return relu(primals[0]), 7 * tangents[0]
"""


def transposed(fun, x):
    """The shapes of the arrays that `fun` transposes."""
    found = equations(jax.make_jaxpr(fun)(x).jaxpr)
    return [e.invars[0].aval.shape for e in found if e.primitive.name == "transpose"]


def test_images_stay_channels_last_from_layer_to_layer():
    first, second = (em.nn.Conv2d(3, 3, 3, padding=1, key=jax.random.key(i)) for i in range(2))
    pool = em.nn.MaxPool2d(2, 2)

    def model(x):
        y = first(x)
        y = y - jnp.mean(y, axis=(1, 2), keepdims=True)
        return jnp.sum(second(pool(jax.nn.relu(y))), axis=(1, 2))

    x = jnp.ones((3, 8, 8))
    images = [shape for shape in transposed(examples_first(model), x) if shape[-2:] != (1, 1)]
    # The image itself, and the two weights.
    assert sorted(images) == [(1, 3, 3, 3, 3), (1, 3, 3, 3, 3), (3, 8, 8)]
    assert len([s for s in transposed(model, x) if len(s) == 3]) > 3


def test_a_model_without_convolutions_keeps_its_transposes():
    def model(x):
        return jnp.transpose(x) @ x

    x = jnp.ones((2, 3))
    assert transposed(examples_first(model), x) == transposed(model, x) == [(2, 3)]
