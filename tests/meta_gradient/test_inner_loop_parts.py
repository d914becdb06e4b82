"""Inner steps in two calls are those of one call: `InnerLoop.__call__(start=)`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import same_bits
from ..helpers import tiny_mlp

KEY = jax.random.key(3)
# A schedule that is over before the last step, and momentum: both are in the optimizer's state.
OPTIMIZER = optax.sgd(optax.linear_schedule(0.2, 0.05, 3), momentum=0.9)


class Dropped(eqx.Module):
    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, *, key=None):
        return self.layer(self.dropout(x, key=key))


def problem():
    model = Dropped(eqx.nn.Linear(6, 1, key=KEY), eqx.nn.Dropout(0.5))
    x = jax.random.normal(KEY, (8, 6))
    return model, (x, jnp.sum(x, axis=1, keepdims=True))


@eqx.filter_jit
def call(run, model, data, **options):
    return run(model, data, key=KEY, **options)


@pytest.mark.parametrize("first", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batches", [False, True])
def test_two_calls_are_one_to_the_bit(first, batches):
    model, data = problem()
    rows = np.arange(16).reshape(4, 4) % 8
    inner = em.InnerLoop(OPTIMIZER, 4)

    def run(steps, start, *args, **options):
        minibatches = jnp.asarray(rows[start : start + steps]) if batches else None
        return call(
            lambda m, d, **o: inner(
                em.losses.mse, m, d, steps=steps, start=start, minibatches=minibatches, **o
            ),
            *args,
            **options,
        )

    whole = run(4, 0, model, data)
    part = run(first, 0, model, data)
    rest = run(4 - first, first, part.model, data, opt_state=part.opt_state)
    assert same_bits(rest.model, whole.model)
    assert same_bits(rest.opt_state, whole.opt_state)
    assert same_bits(jnp.concatenate([part.losses, rest.losses]), whole.losses)
    # Not numbered, the second call drops again what the first one dropped.
    again = run(4 - first, 0, part.model, data, opt_state=part.opt_state)
    assert not same_bits(again.model, whole.model)


@pytest.mark.parametrize("partitionable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_reptile_goes_on_in_its_epoch(partitionable):
    """Its minibatches are its own affair: 3 of 8 examples a step, two epochs and a bit."""
    with jax.threefry_partitionable(partitionable):
        strategy = em.Reptile(
            em.losses.mse, em.InnerLoop(OPTIMIZER, 6), optax.sgd(1.0), batch_size=3
        )
        model, data = problem()

        def run(*args, **options):
            return call(strategy.inner_rollout, *args, **options)

        whole = run(model, data)
        part = run(model, data, steps=2)
        rest = run(part.model, data, steps=4, start=2, opt_state=part.opt_state)
        assert same_bits(rest.model, whole.model)


def test_the_meta_gradient_through_two_calls():
    """Differentiated with respect to the start, in mixed mode, as through one call."""
    model, data = problem()
    inner = em.InnerLoop(OPTIMIZER, 4)

    def objective(model, parts):
        state, start = None, 0
        for steps in parts:
            options = {"key": KEY, "steps": steps, "start": start, "opt_state": state}
            end = inner(em.losses.mse, model, data, **options)
            model, state, start = end.model, end.opt_state, start + steps
        return em.losses.mse(model, data, KEY)[0]

    grads = [eqx.filter_jit(eqx.filter_grad(objective))(model, parts) for parts in ((4,), (2, 2))]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_without_randomness_the_number_of_the_first_step_plays_no_part():
    support = em.tasks.Sinusoid(4, 6).sample(KEY).support
    inner = eqx.filter_jit(em.InnerLoop(OPTIMIZER, 2))
    ends = [inner(em.losses.mse, tiny_mlp(), support, start=start).model for start in (0, 7)]
    assert same_bits(*ends)
