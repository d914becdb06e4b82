"""A model is computed with the examples in front, to the same result as by `jax.vmap`."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata

import eqxmeta as em
from eqxmeta._jaxpr.examples_first import examples_first
from eqxmeta._jaxpr.flops import equations

from ..helpers import tree_allclose


class Products(eqx.Module):
    """Products of all kinds: a matrix and a vector, two vectors, a jitted one, a tensor's, and two
    matrices; with a precision for each side, and a wider result."""

    matrix: jax.Array
    tensor: jax.Array

    def __call__(self, x):
        high, low = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
        y = jax.jit(lambda x: self.matrix @ x)(x)
        y = y + jnp.matmul(self.matrix, x, precision=(high, low))
        y = y * jnp.dot(x, x) + jnp.einsum("abc,bc->a", self.tensor, jnp.outer(x, x))
        y = y + (self.matrix @ self.matrix) @ y
        half = jnp.matmul(
            self.matrix.astype(jnp.bfloat16), x.astype(jnp.bfloat16), preferred_element_type=x.dtype
        )
        return {"y": y, "half": half}


def products(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (4, 4), (4, 4, 4), (5, 4)
    matrix, tensor, x = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    return Products(matrix, tensor), x


@pytest.mark.parametrize("differentiate", [False, True])
def test_the_same_as_by_vmap(differentiate, x64):
    model, x = products(jnp.float64)

    def by_vmap(model, x):
        return jax.vmap(model)(x)

    def by_us(model, x):
        return jax.jit(em.losses.predict)(model, x)

    def gradient(fun):
        def total(model, x):
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fun(model, x)))

        return jax.grad(total, argnums=(0, 1))

    if differentiate:
        by_vmap, by_us = gradient(by_vmap), gradient(by_us)
    assert tree_allclose(by_us(model, x), by_vmap(model, x), rtol=1e-12)


def test_precision_stays_with_its_side():
    model, x = products(jnp.float32)
    jaxpr = jax.make_jaxpr(examples_first(model))(x[0]).jaxpr
    dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    with_precision = [e.params["precision"] for e in dots if e.params["precision"]]
    assert with_precision == [(jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)]


def test_an_algorithm_is_no_pair_of_precisions():
    """It is a tuple by its type; a preset of them is not."""
    f32 = jnp.dtype("float32")
    algorithm = jax.lax.DotAlgorithm(f32, f32, f32)
    matrix, x = jnp.ones((3, 4)), jnp.ones(4)
    for precision in (algorithm, jax.lax.DotAlgorithmPreset.F32_F32_F32):
        product = examples_first(lambda x, p=precision: jnp.dot(matrix, x, precision=p))
        (dot,) = (e for e in equations(jax.make_jaxpr(product)(x).jaxpr) if "dot" in str(e))
        assert dot.params["precision"] == precision


def random_numbers(x):
    with jax.threefry_partitionable(False):
        return x + jax.random.normal(jax.random.key(0), x.shape)


def named(x):
    with jax.named_scope("encoder"):
        return jnp.sin(x)


# Later versions of JAX have a function transformation of this name.
as_a_context = pytest.mark.skipif(
    "out_memory_spaces" in inspect.signature(compute_on).parameters, reason="no context manager"
)


def on_the_host(x):
    with compute_on("device_host"):
        return jnp.sin(x)


def annotated(x):
    with set_xla_metadata(of_the_user="yes"):
        return jnp.sin(x)


def test_settings_around_an_operation_stay_around_it():
    x = jnp.ones((2, 3))
    with jax.threefry_partitionable(True):  # else the model's own setting makes no difference
        np.testing.assert_array_equal(
            jax.jit(lambda x: em.losses.predict(random_numbers, x))(x), jax.vmap(random_numbers)(x)
        )


@pytest.mark.parametrize(
    ("model", "mark"),
    [
        (named, "encoder"),
        pytest.param(on_the_host, "compute_type", marks=as_a_context),
        (annotated, "of_the_user"),
    ],
)
def test_names_and_annotations_of_an_operation_stay_with_it(model, mark):
    x = jnp.ones((2, 3))

    def text(predict):
        return jax.jit(predict).lower(x).as_text(debug_info=True)

    assert mark in text(lambda x: jax.vmap(model)(x))  # else this tests nothing
    assert mark in text(lambda x: em.losses.predict(model, x))


def test_a_dense_network_needs_no_transposes():
    model = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))
    x = jnp.ones((7, 3))

    def transposes(predict):
        return [
            eqn
            for eqn in equations(jax.make_jaxpr(predict)(x).jaxpr)
            if eqn.primitive.name == "transpose"
        ]

    assert transposes(jax.vmap(model))  # else this tests nothing
    assert not transposes(lambda x: em.losses.predict(model, x))
