"""MetaOptNet: its outer step, padding, and what its machine adds. (The machine itself:
`tests/meta_gradient/test_crammer_singer.py`.)"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import eqxmeta as em

from .test_proto_net import blobs, embedding
from .test_r2d2 import THREE_PARTS, check_padding, wide

KEY = jax.random.key(0)


def meta_opt_net(outer=None, **options) -> em.MetaOptNet:
    return em.MetaOptNet(em.losses.cross_entropy, outer or optax.sgd(1.0), **options)


def test_the_outer_step_against_finite_differences(x64):
    """Of the loss that is measured, along random directions of embedding and scale together."""
    tasks = wide(jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 2)))
    strategy = meta_opt_net()
    state = strategy.init(wide(embedding()))
    flat, unravel = ravel_pytree(eqx.filter(state.model, eqx.is_inexact_array))
    static = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)

    @jax.jit
    def objective(flat):
        meta = eqx.combine(unravel(flat), static)

        def of_one(task):
            adapted = strategy.inner_adapt(meta, task.support)
            return em.losses.cross_entropy(adapted, task.query, None)[0]

        return jnp.mean(jax.vmap(of_one)(tasks))

    new, metrics = strategy.outer_update(state, tasks, key=KEY)
    np.testing.assert_allclose(metrics["loss"], objective(flat), rtol=1e-12)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}  # nothing predicts before
    descended = flat - ravel_pytree(eqx.filter(new.model, eqx.is_inexact_array))[0]
    for direction in np.random.default_rng(0).standard_normal((3, len(flat))):
        step = 1e-5 * direction
        estimate = (objective(flat + step) - objective(flat - step)) / 2e-5
        np.testing.assert_allclose(descended @ direction, estimate, rtol=1e-5)
    assert abs(new.model.extra["log_scale"] - state.model.extra["log_scale"]) > 1e-4


@pytest.mark.slow
def test_padding(x64):
    check_padding(meta_opt_net(ways=3), 1e-7)


@pytest.mark.slow
def test_the_cost_matters():
    """Much of it satisfies every margin. Of little, the classifier has the weight of the cost."""
    x, y = support = blobs(3, 3).sample(KEY).support
    slack = []
    for cost in (1e-3, 1e3):
        strategy = meta_opt_net(cost=cost)
        model = strategy.init(eqx.nn.MLP(4, 32, 64, 1, key=KEY)).model
        scores = jax.vmap(strategy.inner_adapt(model, support))(x) / 10  # the scale, at first
        right = jnp.take_along_axis(scores, y[:, None], axis=1)
        slack.append(jnp.max(scores + 1 - jax.nn.one_hot(y, 3) - right, axis=1))
    assert slack[0].min() > 0.9 and slack[1].max() < 1e-2


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_tasks_and_arguments_are_named():
    with pytest.raises(ValueError, match=r"`MetaOptNet\(ways=...\)`" + THREE_PARTS):
        meta_opt_net(ways=0)
    with pytest.raises(ValueError, match=r"`MetaOptNet\(cost=...\)`" + THREE_PARTS):
        meta_opt_net(cost=0.0)
    support = jnp.ones((2, 4)), jnp.array([0, 2])
    with pytest.raises(TypeError, match="MetaOptNet" + THREE_PARTS):
        meta_opt_net().inner_adapt(embedding(), support)
    strategy = meta_opt_net(ways=2)
    classifier = strategy.inner_adapt(strategy.init(embedding()).model, support)
    assert jnp.isnan(classifier(jnp.ones(4))).all()
