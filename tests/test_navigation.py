"""The estimator of `examples/navigation.py`, against the closed forms of Gaussian problems."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.lax import stop_gradient

import eqxmeta as em

NAVIGATION = Path(__file__).parent.parent / "examples/navigation.py"
GOAL, SCALE, MEAN, RATE = 0.7, 0.5, 0.2, 0.1


@pytest.fixture(scope="module")
def expected_return():
    return runpy.run_path(str(NAVIGATION))["expected_return"]


def walks(mean, key, horizon, number):
    """Log probabilities of actions from N(mean, SCALE), and rewards `-(position - GOAL)**2`."""
    noise = SCALE * jax.random.normal(key, (horizon, number))
    actions = stop_gradient(mean + noise)
    log_probs = jax.scipy.stats.norm.logpdf(actions, mean, SCALE)
    return log_probs, -((jnp.cumsum(actions, axis=0) - GOAL) ** 2)


@pytest.mark.parametrize("horizon", [1, 2])
def test_derivatives_of_a_gaussian_walk(expected_return, horizon, x64):
    """After t steps the position is N(t mean, t SCALE**2), so that the expected return is
    `-sum((t mean - GOAL)**2 + t SCALE**2)`."""

    def estimate(mean, key):
        return expected_return(*walks(mean, key, horizon, 20))

    orders = estimate, jax.grad(estimate), jax.grad(jax.grad(estimate))
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = jax.jit(jax.vmap(lambda key: jnp.stack([f(MEAN, key) for f in orders])))(keys)
    found = np.asarray(found)
    t = np.arange(1, horizon + 1)
    value = -np.sum((t * MEAN - GOAL) ** 2 + t * SCALE**2)
    expected = value, -2 * np.sum(t * (t * MEAN - GOAL)), -2 * np.sum(t**2)
    error = np.std(found, axis=0) / np.sqrt(len(keys))
    assert np.all(error < np.array([0.01, 0.02, 0.2]))
    assert np.all(np.abs(np.mean(found, axis=0) - expected) < 4 * error)


def test_the_derivative_through_a_step_and_its_error(expected_return, x64):
    """J = -(mean - GOAL)**2 - SCALE**2, of which the step goes to mean + RATE J'. The derivative of
    J there, in mean, is J' times (1 - 2 RATE). Ten times the walks: the error over sqrt(10)."""

    def error(number):
        def loss(mean, key, _):
            return -expected_return(*walks(mean, key, 1, number)), {}

        strategy = em.MAML(loss, em.InnerLoop(optax.sgd(RATE), 1), optax.sgd(1.0))

        def estimate(mean, key):
            task = em.Task(*jax.random.split(key))
            return -strategy.task_loss(mean, task, step=jnp.int32(0), key=None)[0]

        keys = jax.random.split(jax.random.key(1), 400)
        found = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(jnp.float64(MEAN), keys)
        adapted = MEAN - 2 * RATE * (MEAN - GOAL)
        expected = -2 * (adapted - GOAL) * (1 - 2 * RATE)
        return np.sqrt(np.mean((found - expected) ** 2))

    few, more, many = (error(number) for number in (20, 200, 2_000))
    assert many < 0.05 and 2.4 < few / more < 4.2 and 2.4 < more / many < 4.2
