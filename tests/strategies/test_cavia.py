"""CAVIA: the context adapts from zero, all else is learnt."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

KEY = jax.random.key(0)
RATE = 0.1
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


class Shifted(eqx.Module):
    """`w.x + u.tanh(context)`"""

    w: jax.Array
    u: jax.Array
    context: jax.Array

    def __call__(self, x):
        return jnp.sum(self.w * x, keepdims=True) + jnp.sum(
            self.u * jnp.tanh(self.context), keepdims=True
        )


def cavia(steps=1, gradient: Any = "mixed", outer=None, **options):
    inner = em.InnerLoop(optax.sgd(RATE), steps, gradient)
    return em.CAVIA(em.losses.mse, inner, outer or optax.sgd(1.0), **options)


def shifted(context=0.0) -> Shifted:
    rng = np.random.default_rng(1)
    w, u = (jnp.asarray(rng.standard_normal(n)) for n in (3, 2))
    return Shifted(w, u, jnp.full(2, context, w.dtype))


class Offsets(eqx.Module):
    """Lines of one slope, an offset for each task."""

    def sample(self, key):
        of_x, of_offset = jax.random.split(key)
        x = jax.random.normal(of_x, (9, 3))
        y = x @ jnp.array([[1.0], [-2.0], [0.5]]) + jax.random.normal(of_offset)
        return em.Task((x[:4], y[:4]), (x[4:], y[4:]))


def batch(count=1):
    tasks = jax.vmap(Offsets().sample)(jax.random.split(KEY, count))
    return jax.tree.map(lambda x: x.astype(float), tasks)


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_one_step_by_hand(x64, start):
    """In NumPy; wherever the context of the model was, it begins at zero."""
    model, tasks = shifted(start), batch()
    (x, y), (xq, yq) = jax.tree.map(lambda x: np.asarray(x[0]), (tasks.support, tasks.query))
    w, u = np.asarray(model.w), np.asarray(model.u)
    mean_residual = (x @ w - y[:, 0]).mean()
    phi = -RATE * 2 * mean_residual * u  # tanh'(0) = 1
    slope = 1 - np.tanh(phi) ** 2
    error = xq @ w + u @ np.tanh(phi) - yq[:, 0]
    # How the adapted context moves with w and with u.
    along_w = -RATE * 2 * (u @ (u * slope)) * x.mean(0)
    along_u = np.tanh(phi) + u * slope * (-RATE * 2 * mean_residual)
    d_w = 2 * (error[:, None] * (xq + along_w)).mean(0)
    d_u = 2 * error.mean() * along_u

    strategy = cavia()
    state = strategy.init(model)
    adapted = strategy.inner_adapt(eqx.tree_at(lambda m: m.context, model, jnp.ones(2)), (x, y))
    np.testing.assert_allclose(adapted.context, phi, rtol=1e-12)
    new, metrics = strategy.outer_update(state, tasks, key=None)
    np.testing.assert_allclose(model.w - new.model.w, d_w, rtol=1e-10)
    np.testing.assert_allclose(model.u - new.model.u, d_u, rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-12)
    before = np.mean((xq @ w - yq[:, 0]) ** 2)
    np.testing.assert_allclose(metrics["loss_before"], before, rtol=1e-12)


@pytest.mark.parametrize("gradient", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_three_steps_against_plain_jax(x64, gradient):
    model, tasks = shifted(), batch(2)

    def loss(phi, w, u, x, y):
        return jnp.mean((x @ w + u @ jnp.tanh(phi) - y[:, 0]) ** 2)

    def after(w, u, task):
        phi = jnp.zeros(2)
        for _ in range(3):
            phi = phi - RATE * jax.grad(loss)(phi, w, u, *task.support)
        return loss(phi, w, u, *task.query)

    def objective(w, u):
        return jnp.mean(jax.vmap(lambda task: after(w, u, task))(tasks))

    d_w, d_u = jax.jit(jax.grad(objective, (0, 1)))(model.w, model.u)
    strategy = cavia(3, gradient)
    new, _ = strategy.outer_update(strategy.init(model), tasks, key=None)
    np.testing.assert_allclose(model.w - new.model.w, d_w, rtol=1e-9)
    np.testing.assert_allclose(model.u - new.model.u, d_u, rtol=1e-9)


def test_it_learns_and_the_context_stays_zero_to_the_bit():
    strategy = cavia(2, outer=optax.adamw(0.05, weight_decay=0.1))
    trainer = em.Trainer(strategy, meta_batch_size=4, summary=False)
    state = trainer.fit(shifted(0.5), Offsets(), 150)
    assert np.array_equal(np.asarray(state.model.context).view(np.uint32), np.zeros(2, np.uint32))
    # No moments for it either.
    assert all(x.context is None for x in (state.opt_state[0].mu, state.opt_state[0].nu))
    before, after = (
        em.evaluate(strategy, m, Offsets(), num_tasks=50).mean() for m in (shifted(), state.model)
    )
    assert after[2] < 0.1 * before[2] and after[2] < 0.3 * after[0]


def test_it_is_maml_that_does_not_learn_what_adapts(x64):
    """From a context at zero. MAML by itself learns where the context begins."""
    inner = em.InnerLoop(optax.sgd(RATE), 2, adapt=lambda m: m.context)
    rest = lambda m: (m.w, m.u)  # noqa: E731
    tasks, states = batch(2), []
    for strategy in (
        cavia(2),
        em.MAML(em.losses.mse, inner, optax.sgd(1.0), learn=rest),
        em.MAML(em.losses.mse, inner, optax.sgd(1.0)),
    ):
        states.append(strategy.outer_update(strategy.init(shifted()), tasks, key=None)[0])
    ours, maml, learns_all = (state.model for state in states)
    np.testing.assert_allclose(ours.w, maml.w, rtol=1e-12)
    np.testing.assert_allclose(ours.u, maml.u, rtol=1e-12)
    assert np.abs(learns_all.context).max() > 1e-3


def test_what_is_learnt_is_narrowed_never_widened():
    model = shifted()
    masks = [
        cavia(learn=learn, context=context).learnt(model)
        for learn, context in (
            (None, None),
            (lambda m: (m.w, m.context), None),
            (None, lambda m: m.u),
        )
    ]
    assert [(m.w, m.u, m.context) for m in masks] == [
        (True, True, False), (True, False, False), (True, False, True),
    ]  # fmt: skip


@pytest.mark.usefixtures("as_users_run_it")
def test_mistakes_are_named():
    with pytest.raises(TypeError, match=r"`CAVIA\(context=...\)`" + THREE_PARTS):
        cavia(context="context")
    with pytest.raises(ValueError, match=r"`CAVIA\(context=...\)`" + THREE_PARTS):
        cavia().init(eqx.nn.MLP(1, 1, 4, 1, key=KEY))  # has none
    with pytest.raises(ValueError, match="Nothing is learnt" + THREE_PARTS):
        cavia(learn=lambda m: m.context).init(shifted())
    inner = em.InnerLoop(optax.sgd(RATE), 1, adapt=lambda m: m.w)
    with pytest.raises(ValueError, match=r"`CAVIA\(inner=...\)`" + THREE_PARTS):
        em.CAVIA(em.losses.mse, inner, optax.sgd(1.0))
    with pytest.raises(TypeError, match=r"`CAVIA\(inner=...\)`" + THREE_PARTS):
        em.CAVIA(em.losses.mse, None, optax.sgd(1.0))  # pyright: ignore
