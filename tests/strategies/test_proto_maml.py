"""Proto-MAML, against its update rule in plain JAX."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import eqxmeta as em

from .test_proto_net import blobs, embedding

KEY = jax.random.key(0)
RATE = 0.1
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def proto_maml(steps=2, gradient: Any = "mixed", outer=None, *, adapt=None, rate=RATE, **options):
    inner = em.InnerLoop(optax.sgd(rate), steps, gradient, adapt=adapt)
    return em.ProtoMAML(em.losses.cross_entropy, inner, outer or optax.sgd(1.0), **options)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def query_loss(flat, unravel, task, steps):
    """Of one task, written out: labels in any order, every class there."""
    (x, y), (xq, yq) = task.support, task.query
    member = (y[:, None] == jnp.arange(3)[None]).astype(float)

    def cross_entropy(parts, x, y):
        flat, w, b = parts
        logits = jax.vmap(unravel(flat))(x) @ w.T + b[None]
        log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=1, keepdims=True))
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

    f = jax.vmap(unravel(flat))(x)
    c = (member.T @ f) / member.sum(0)[:, None]
    parts = flat, 2 * c, -jnp.einsum("kd,kd->k", c, c)
    for _ in range(steps):
        grads = jax.grad(cross_entropy)(parts, x, y)
        parts = jax.tree.map(lambda p, g: p - RATE * g, parts, grads)
    return cross_entropy(parts, xq, yq)


@pytest.mark.parametrize("gradient", [pytest.param("mixed", marks=pytest.mark.slow), "reverse"])
def test_the_outer_step_is_that_of_plain_jax(x64, gradient):
    """The gradient through the prototypes is a part of it."""
    tasks, model = wide(jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 2))), wide(embedding())
    order = jnp.array([4, 0, 2, 5, 1, 3])  # unsorted
    tasks = eqx.tree_at(lambda t: t.support, tasks, [s[:, order] for s in tasks.support])
    tasks = em.Task(tuple(tasks.support), tasks.query)
    strategy = proto_maml(gradient=gradient, ways=3 if gradient == "reverse" else None)
    state, metrics = strategy.outer_update(strategy.init(model), tasks, key=KEY)
    flat, unravel = ravel_pytree(eqx.filter(model, eqx.is_array))
    static = eqx.filter(model, eqx.is_array, inverse=True)

    def objective(flat):
        whole = lambda flat: eqx.combine(unravel(flat), static)  # noqa: E731
        return jnp.mean(jax.vmap(lambda t: query_loss(flat, whole, t, 2))(tasks))

    loss, expected = jax.jit(jax.value_and_grad(objective))(flat)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    descended = flat - ravel_pytree(eqx.filter(state.model, eqx.is_array))[0]
    np.testing.assert_allclose(descended, expected, rtol=1e-9, atol=1e-12)
    assert metrics.keys() == {
        "loss", "accuracy", "grad_norm", "support_loss/0", "support_loss/1",
    }  # fmt: skip


@pytest.mark.slow
def test_before_the_first_step_it_is_a_prototypical_network(x64):
    """And what adapts makes a difference."""
    model, tasks = wide(embedding()), wide(jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 6)))
    proto_net = em.ProtoNet(em.losses.cross_entropy, optax.sgd(1.0))
    expected = em.evaluate(proto_net, model, tasks).values
    ours = em.evaluate(proto_maml(), model, tasks, inner_steps=3).values
    assert ours["loss"].shape == (6, 4)
    np.testing.assert_allclose(ours["loss"][:, 0], expected["loss"][:, 1], rtol=1e-11)
    np.testing.assert_allclose(ours["accuracy"][:, 0], expected["accuracy"][:, 1])
    assert np.abs(ours["loss"][:, 1] - ours["loss"][:, 0]).max() > 1e-3


@pytest.mark.slow
def test_trained_5_way_it_is_evaluated_7_way_and_has_learnt():
    strategy = proto_maml(outer=optax.adam(1e-2))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=False)
    state = trainer.fit(embedding(), blobs(5, 2, 3), 60)
    assert isinstance(state.model, eqx.nn.MLP)
    before, after = (
        em.evaluate(strategy, model, blobs(7, 1), num_tasks=50)
        for model in (embedding(), state.model)
    )
    assert np.isfinite(after.values["loss"]).all()
    assert after.mean()[-1] < 0.9 * before.mean()[-1]


@pytest.mark.slow
def test_classes_that_are_not_there_change_nothing(x64):
    """More logits than classes, as in every compiled program, with Adam and a rare order."""
    task, model = wide(blobs(3, 2).sample(KEY)), wide(embedding())
    inner = em.InnerLoop(optax.adam(0.01), 2)
    losses = []
    for ways in (3, 5, None):
        strategy = em.ProtoMAML(em.losses.cross_entropy, inner, optax.sgd(1.0), ways=ways)
        classifier = strategy.inner_adapt(model, task.support)
        logits = jax.vmap(classifier)(task.query[0])
        assert logits.shape == (6, ways or 6) and np.isneginf(logits[:, 3:]).all()
        losses.append(em.losses.cross_entropy(classifier, task.query, None)[0])
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-12)
    # Without a jit around it the labels say how many there are.
    assert proto_maml().inner_rollout(model, task.support).model.head.bias.shape == (3,)


def test_the_head_may_adapt_alone():
    task = blobs(3, 2).sample(KEY)
    classifier = proto_maml(adapt=lambda p: p.head).inner_adapt(embedding(), task.support)
    assert eqx.tree_equal(classifier.embedding, embedding())
    start = proto_maml(rate=0.0).inner_adapt(embedding(), task.support)
    assert not np.allclose(classifier.head.weight, start.head.weight)


@pytest.mark.slow
def test_an_embedding_that_drops_out_or_normalises_by_the_support_set():
    for body in (
        em.nn.Conv4(1, ways=None, width=4, key=KEY),
        eqx.nn.Sequential(
            [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(784, 4, key=KEY), eqx.nn.Dropout(0.5)]
        ),
    ):
        x = jax.random.normal(KEY, (2, 6, 1, 28, 28))
        y = jnp.tile(jnp.array([0, 1, 2, 0, 1, 2]), (2, 1))
        strategy = proto_maml()
        state, metrics = strategy.outer_update(
            strategy.init(body), em.Task((x, y), (x, y)), key=KEY
        )
        assert all(np.isfinite(value) for value in metrics.values())
        adapted = strategy.inner_adapt(state.model, (x[0], y[0]), key=KEY)
        assert np.isfinite(eqx.nn.inference_mode(adapted)(x[0, 0])[:3]).all()


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_and_labels_are_named():
    with pytest.raises(TypeError, match=r"`ProtoMAML\(ways=...\)`" + THREE_PARTS):
        proto_maml(ways=2.5)
    with pytest.raises(ValueError, match=r"`ProtoMAML\(ways=...\)`" + THREE_PARTS):
        proto_maml(ways=0)
    x = jnp.zeros((4, 4))
    with pytest.raises(TypeError, match="The labels of `support` are not integers" + THREE_PARTS):
        proto_maml().inner_adapt(embedding(), (x, jnp.zeros(4)))
    adapted = proto_maml(ways=2).inner_adapt(embedding(), (x, jnp.array([0, 1, 2, 1])))
    assert np.isnan(adapted(x[0])).all()
