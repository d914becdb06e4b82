"""R2-D2, against least squares in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import eqxmeta as em

from .test_proto_net import blobs

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
LABELS = jnp.array([4, 0, 2, 4, 0, 0, 2])  # unsorted, not balanced, and 1 and 3 are not there


def r2d2(loss=em.losses.cross_entropy, outer=None, **options) -> em.R2D2:
    return em.R2D2(loss, outer or optax.sgd(1.0), **options)


def embedding(features: int) -> eqx.nn.MLP:
    return eqx.nn.MLP(4, features, 8, 1, key=KEY)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def learnt(strategy, model, penalty: float, scale: float) -> em.MetaParameters:
    made = strategy.init(model).model
    assert made.extra["log_lambda"] == 0 and np.isclose(made.extra["log_scale"], np.log(10))
    extra = {"log_lambda": jnp.log(penalty), "log_scale": jnp.log(scale)}
    return em.MetaParameters(made.model, extra)


def by_hand(embed, x, targets, queries, penalty) -> np.ndarray:
    """`[queries, outputs]`, by least squares with rows for the penalty: no normal equations."""
    f, q = (np.asarray(jax.vmap(embed)(e)) for e in (x, queries))
    f, q = (np.hstack([e, np.ones((len(e), 1))]) for e in (f, q))
    rows = np.vstack([f, np.sqrt(penalty) * np.eye(f.shape[1])])
    right = np.vstack([targets, np.zeros((f.shape[1], targets.shape[1]))])
    return q @ np.linalg.lstsq(rows, right)[0]


@pytest.mark.parametrize("features", [3, 20])
def test_against_least_squares_in_both_spaces(x64, features):
    """Seven examples: less than 20 features, more than 3; as logits and as a regression."""
    model, strategy = wide(embedding(features)), r2d2()
    x, queries = jax.random.normal(KEY, (7, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    meta = learnt(strategy, model, 0.3, 2.5)
    predict = eqx.filter_jit(lambda s: jax.vmap(strategy.inner_adapt(meta, s))(queries))
    expected = 2.5 * by_hand(model, x, np.eye(7)[LABELS], queries, 0.3)
    expected[:, [1, 3, 5, 6]] = -np.inf
    np.testing.assert_allclose(predict((x, LABELS)), expected, rtol=1e-9)
    y = jax.random.normal(jax.random.key(2), (7, 2))
    expected = by_hand(model, x, np.asarray(y), queries, 0.3)  # without a scale
    np.testing.assert_allclose(predict((x, y)), expected, rtol=1e-9)


def test_the_outer_step_is_that_of_the_closed_form(x64):
    tasks = wide(jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 2)))
    strategy = r2d2()
    state = strategy.init(wide(embedding(20)))
    flat, unravel = ravel_pytree(eqx.filter(state.model, eqx.is_inexact_array))
    static = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)

    def task_loss(meta, task):
        (x, y), (xq, yq) = task.support, task.query
        f, q = (
            jnp.pad(jax.vmap(meta.model)(e), ((0, 0), (0, 1)), constant_values=1) for e in (x, xq)
        )
        inverse = jnp.linalg.inv(f.T @ f + jnp.exp(meta.extra["log_lambda"]) * jnp.eye(21))
        logits = jnp.exp(meta.extra["log_scale"]) * q @ inverse @ f.T @ jnp.eye(3)[y]
        log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=1, keepdims=True))
        return -jnp.mean(jnp.take_along_axis(log_p, yq[:, None], axis=1))

    def objective(flat):
        meta = eqx.combine(unravel(flat), static)
        return jnp.mean(jax.vmap(lambda task: task_loss(meta, task))(tasks))

    loss, expected = jax.jit(jax.value_and_grad(objective))(flat)
    new, metrics = strategy.outer_update(state, tasks, key=KEY)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-10)
    descended = flat - ravel_pytree(eqx.filter(new.model, eqx.is_inexact_array))[0]
    np.testing.assert_allclose(descended, expected, rtol=1e-7, atol=1e-11)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}  # nothing predicts before
    extra, gradient = new.model.extra, state.model.extra
    assert all(abs(extra[name] - gradient[name]) > 1e-4 for name in extra)


class Normed(eqx.Module):
    """Features that are normalised by the support set."""

    first: eqx.nn.Linear
    norm: em.nn.SupportNorm
    last: eqx.nn.Linear

    def __init__(self):
        self.first = eqx.nn.Linear(4, 8, key=KEY)
        self.norm = em.nn.SupportNorm(8)
        self.last = eqx.nn.Linear(8, 5, key=KEY)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def padded(task: em.Task) -> em.Task:
    """Three more support examples, which are not there."""
    (x, y), query = task.support, task.query
    weight = jnp.array([1.0, 0, 1, 1, 0, 1, 1, 1, 0])
    where = jnp.array([0, 2, 3, 5, 6, 7])
    more = (jnp.full((9, *a.shape[1:]), fill, a.dtype) for a, fill in ((x, jnp.nan), (y, 0)))
    return em.Task(
        (*(m.at[where].set(a) for m, a in zip(more, (x, y), strict=True)), weight), query
    )


def check_padding(strategy: em.GradientStrategy, precision: float):
    """A padded task is the task: the same logits, loss and meta-gradient."""
    task, state = wide(blobs(3, 2).sample(KEY)), strategy.init(wide(Normed()))
    outcomes = []
    for one in (task, padded(task)):
        predict = strategy.inner_adapt(state.model, one.support)
        batch = jax.tree.map(lambda x: x[None], one)
        new, metrics = strategy.outer_update(state, batch, key=KEY)
        outcomes.append((jax.vmap(predict)(one.query[0]), new.model, metrics))
    for x, y in zip(*(jax.tree.leaves(eqx.filter(o, eqx.is_array)) for o in outcomes), strict=True):
        np.testing.assert_allclose(x, y, rtol=precision, atol=precision)
    assert outcomes[0][2]["grad_norm"] > 1e-3


@pytest.mark.slow
def test_padding_of_a_classification_task(x64):
    check_padding(r2d2(ways=3), 1e-12)


def test_padding_of_a_regression_task(x64):
    x, y = jax.random.normal(KEY, (6, 4)), jax.random.normal(KEY, (6, 2))
    both = em.Task((x, y), (x, y))
    strategy = r2d2(em.losses.mse)
    meta, (xp, yp, weight) = strategy.init(embedding(9)).model, padded(both).support
    yp = jnp.where(weight[:, None] > 0, yp, jnp.nan)
    outputs = (jax.vmap(strategy.inner_adapt(meta, s))(x) for s in (both.support, (xp, yp, weight)))
    np.testing.assert_allclose(*outputs, rtol=1e-12, atol=1e-12)


class Scaled(eqx.Module):
    scale: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

    def __call__(self, x):
        return self.scale * x


class Lines(eqx.Module):
    """`y = c·x + b + noise`: c and b have unit variance, the noise has 4."""

    def sample(self, key):
        keys = jax.random.split(key, 3)
        x, c = jax.random.normal(keys[0], (14, 3)), jax.random.normal(keys[1], (4, 1))
        y = x @ c[:3] + c[3:] + 2 * jax.random.normal(keys[2], (14, 1))
        return em.Task((x[:6], y[:6]), (x[6:], y[6:]))


def test_the_learnt_penalty_is_that_of_the_posterior():
    """The posterior's mean is the ridge regression with λ = 2². More, or less, is worse."""
    outer = optax.adam(optax.cosine_decay_schedule(0.1, 120))
    strategy = r2d2(em.losses.mse, outer, learn=lambda model: ())
    trainer = em.Trainer(strategy, meta_batch_size=200, summary=False)
    state = trainer.fit(Scaled(), Lines(), 120)
    penalty = float(jnp.exp(state.model.extra["log_lambda"]))
    assert 3.4 < penalty < 4.7
    error = {
        value: em.evaluate(strategy, learnt(strategy, Scaled(), value, 1), Lines(), seed=1)
        for value in (penalty, 1.0, 1e6)
    }
    error = {value: result.mean()[-1] for value, result in error.items()}
    assert error[penalty] < 0.98 * error[1.0] and error[penalty] < 0.9 * error[1e6]
    assert 7.4 < error[1e6] < 8.6  # nothing is left of the head: 4 + 3 + 1


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_tasks_and_arguments_are_named():
    with pytest.raises(ValueError, match=r"`R2D2\(ways=...\)`" + THREE_PARTS):
        r2d2(ways=0)
    support = jnp.ones((2, 4)), jnp.array([0, 2])
    with pytest.raises(TypeError, match="R2D2" + THREE_PARTS):
        r2d2().inner_adapt(embedding(3), support)
    strategy = r2d2(ways=2)
    classifier = strategy.inner_adapt(strategy.init(embedding(3)).model, support)
    assert jnp.isnan(classifier(jnp.ones(4))).all()
    with pytest.raises(ValueError, match="targets of `R2D2`" + THREE_PARTS):
        strategy.inner_adapt(strategy.init(embedding(3)).model, (jnp.ones((2, 4)), jnp.ones(2)))
