"""A traced function that is evaluated equation by equation: what it keeps, and what it gives up."""

import gc
import logging
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqxmeta as em
from eqxmeta._jaxpr.examples_first import examples_first
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


class Jitted(eqx.Module):
    """A model of which the user compiles the expensive part."""

    scale: jax.Array

    @eqx.filter_jit
    def part(self, x):
        return jnp.sinh(self.scale * jnp.cosh(x))

    def __call__(self, x):
        return self.part(x)


@pytest.mark.parametrize("differentiate", [False, True])
def test_outside_of_a_program_the_users_own_jit_stays(differentiate, caplog):
    model, x = Jitted(jnp.ones(())), jnp.ones((2, 11 + differentiate))

    def total(model):
        return jnp.sum(em.losses.predict(model, x))

    with caplog.at_level(logging.WARNING), jax.log_compiles():
        (jax.grad(total) if differentiate else total)(model)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    assert any("jit(part)" in message for message in compiled)
    assert not any("jit(sinh)" in message for message in compiled), compiled


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
    plain = jax.jit(lambda x: jnp.sin(x))

    def model(x):
        return plain(placed(x))

    x = jnp.ones((2, 3))
    assert asked_for(examples_first(model), x[0]) == [(sharding,)]
    predicted = jax.jit(lambda x: em.losses.predict(model, x))(x)
    np.testing.assert_allclose(predicted, np.sin(np.sqrt(2 * np.ones((2, 3)))), rtol=1e-6)

    # The optimizer's square roots, and what an inner loop computes once.
    def loss(weights, batch, key):
        return jnp.sum((weights - placed(batch)) ** 2), {}

    inner = em.InnerLoop(optax.adam(0.1), steps=3)
    assert asked_for(lambda w, x: inner(loss, w, x).model, jnp.ones(3), jnp.ones(3))
