"""A traced function that is evaluated equation by equation: what it keeps, and what it gives up."""

import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqxmeta as em
from eqxmeta._jaxpr.flops import equations
from eqxmeta._jaxpr.interpret import interpret


def test_values_go_after_their_last_use():
    def fun(x, y):
        a = jnp.sin(x)
        b = jnp.cos(a)
        _unused = b + 3
        c = jnp.tan(b) + a
        return jnp.exp(jnp.exp(c)), a, y

    alive = []

    def rule(eqn, inputs):
        # An operation of its own for each, so that nothing else holds its result.
        out = eqn.primitive.bind(*inputs, **eqn.params)
        held.append(weakref.ref(out))
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        return [out]

    held = []
    x = jnp.arange(3.0)
    closed = jax.make_jaxpr(fun)(x, x)
    assert len(closed.eqns) == 7
    out = interpret(closed, [x, x], rule)
    # `a` is a result. Besides it, never more than what comes in and what comes out.
    assert max(alive) <= 4 and alive[-1] == 3
    for one, expected in zip(out, fun(x, x), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-6)


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


def interpreted(fun):
    def same(x):
        return interpret(jax.make_jaxpr(fun)(x), [x], lambda eqn, inputs: None)[0]

    return same


def test_settings_around_an_operation_stay_around_it():
    x = jnp.ones((2, 3))
    with jax.threefry_partitionable(True):  # else the function's own setting makes no difference
        found, expected = jax.jit(interpreted(random_numbers))(x), random_numbers(x)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("fun", "mark"),
    [
        (named, "encoder"),
        pytest.param(on_the_host, "compute_type", marks=as_a_context),
        (annotated, "of_the_user"),
    ],
)
def test_names_and_annotations_of_an_operation_stay_with_it(fun, mark):
    x = jnp.ones((2, 3))
    texts = [jax.jit(f).lower(x).as_text(debug_info=True) for f in (fun, interpreted(fun))]
    assert all(mark in text for text in texts)


def asked_for(fun, *args):
    """Of the nested programs, those that ask for shardings of their results."""
    return [
        eqn.params["out_shardings"]
        for eqn in equations(jax.make_jaxpr(fun)(*args).jaxpr)
        if eqn.primitive.name == "jit"
        and any(isinstance(s, NamedSharding) for s in eqn.params["out_shardings"])
    ]


def test_a_nested_jit_keeps_the_shardings_that_it_asks_for():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("d",)), PartitionSpec())
    placed = jax.jit(lambda x: jnp.sqrt(x + 1), out_shardings=sharding)

    # The optimizer's square roots, and what an inner loop computes once.
    def loss(weights, batch, key):
        return jnp.sum((weights - placed(batch)) ** 2), {}

    inner = em.InnerLoop(optax.adam(0.1), 3, "reverse", adapt=lambda w: w)
    asked = asked_for(lambda w, x: inner(loss, w, x).model, jnp.ones(3), jnp.ones(3))
    assert asked == [(sharding,)]
