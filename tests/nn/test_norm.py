"""Normalisation layers: whose statistics, what depends on what, and what is refused."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta.callbacks import Callback, Evaluate

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
predict = eqx.filter_jit(em.losses.predict)
call = eqx.filter_jit(lambda model, x: model(x))
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


class Net(eqx.Module):
    """`[1, 4] -> [2]`: a convolution, a norm over 3 channels of 4 positions, one over features."""

    conv: eqx.nn.Conv1d
    norm: Any
    linear: eqx.nn.Linear
    last: Any

    def __init__(self, norm=em.nn.SupportNorm, key=KEY):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv1d(1, 3, 3, padding=1, key=first)
        self.norm = norm(3)
        self.linear = eqx.nn.Linear(12, 2, key=second)
        self.last = norm(2)

    def __call__(self, x: Array) -> Array:
        return self.last(self.linear(jax.nn.tanh(self.norm(self.conv(x))).ravel()))


def examples(n: int, seed: int) -> tuple[Array, Array]:
    first, second = jax.random.split(jax.random.key(seed))
    x = 2 * jax.random.normal(first, (n, 1, 4)) + 1
    return x, jax.random.normal(second, (n, 2))


def batch(seed: int = 0) -> em.Task:
    """Two tasks, 5 support and 3 query examples."""
    tasks = [em.Task(examples(5, seed + i), examples(3, seed + 10 + i)) for i in range(2)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *tasks)


def task() -> em.Task:
    return jax.tree.map(lambda x: x[0], batch())


def loop(gradient="mixed", steps: int = 2) -> em.InnerLoop:
    return em.InnerLoop(optax.sgd(0.1), steps, gradient)


@functools.cache  # the same optimizers, hence the same compiled programs
def maml(gradient="mixed", steps: int = 2, loss=MSE) -> em.MAML:
    return em.MAML(loss, loop(gradient, steps), optax.sgd(0.1))


def by_numpy(model: Net, support: Array, queries: Array) -> np.ndarray:
    """The predictions for `queries`, normalised with the statistics of `support`."""

    def norm(layer, s, q):
        axes = (0, *range(2, s.ndim))
        shape = (1, -1, *[1] * (s.ndim - 2))
        mean, var = s.mean(axes).reshape(shape), s.var(axes).reshape(shape)
        gamma, beta = (np.asarray(p).reshape(shape) for p in (layer.weight, layer.bias))
        return [gamma * (z - mean) / np.sqrt(var + 1e-5) + beta for z in (s, q)]

    def conv(x):
        weight, bias = np.asarray(model.conv.weight), np.asarray(model.conv.bias)
        padded = np.pad(np.asarray(x), ((0, 0), (0, 0), (1, 1)))
        windows = np.stack([padded[:, 0, i : i + 4] for i in range(3)], -1)  # [n, 4, 3]
        return np.einsum("npk,ck->ncp", windows, weight[:, 0]) + bias

    s, q = norm(model.norm, conv(support), conv(queries))
    weight, bias = np.asarray(model.linear.weight), np.asarray(model.linear.bias)
    s, q = (np.tanh(z).reshape(len(z), -1) @ weight.T + bias for z in (s, q))
    return norm(model.last, s, q)[1]


def with_affine(model: Net) -> Net:
    return eqx.tree_at(
        lambda m: (m.norm.weight, m.norm.bias, m.last.bias),
        model,
        (jnp.array([0.5, 1.0, 2.0]), jnp.array([0.1, -0.2, 0.3]), jnp.array([1.0, -1.0])),
    )


# Whose statistics.


@pytest.mark.parametrize("layer", [em.nn.SupportNorm, em.nn.BatchNorm])
def test_a_batch_is_normalised_by_itself(layer):
    model, (x, _) = with_affine(Net(layer)), examples(5, 0)
    np.testing.assert_allclose(predict(model, x), by_numpy(model, x, x), atol=1e-5)


def test_an_adapted_model_has_the_statistics_of_the_support_set_under_its_own_weights():
    (x, y), (queries, _) = task().support, task().query
    adapted = maml().inner_adapt(with_affine(Net()), (x, y))
    expected = by_numpy(adapted, x, queries)
    one_by_one = np.stack([call(adapted, q) for q in queries])
    np.testing.assert_allclose(one_by_one, expected, atol=1e-5)
    np.testing.assert_allclose(predict(adapted, queries), expected, atol=1e-5)
    # And the weights are not those of the beginning.
    assert not np.allclose(expected, by_numpy(with_affine(Net()), x, queries), atol=1e-2)


STRATEGIES = {
    "MAML": lambda: maml(),
    "Joint": lambda: em.Joint(MSE, loop(), optax.sgd(0.1)),
    "Reptile": lambda: em.Reptile(MSE, loop(), optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    "name", ["MAML", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Joint", "Reptile"))]
)
def test_query_losses_are_those_of_the_support_statistics(name):
    strategy, model, tasks = STRATEGIES[name](), Net(), batch()
    state, metrics = strategy.outer_update(strategy.init(model), tasks, key=None)
    assert jax.tree.structure(state.model) == jax.tree.structure(model)

    def query_loss(data, adapt: bool) -> np.ndarray:
        losses = []
        for i in range(2):
            t = jax.tree.map(lambda x, i=i: x[i], tasks)
            learner = strategy.inner_adapt(model, t.pooled if data == "pooled" else t.support)
            prediction = by_numpy(learner if adapt else model, t.support[0], t.query[0])
            losses.append(np.mean((prediction - t.query[1]) ** 2))
        return np.array(losses)

    trained_on = "pooled" if name == "Reptile" else "support"
    np.testing.assert_allclose(metrics["loss"], query_loss(trained_on, True).mean(), rtol=1e-4)
    before = query_loss("support", False)
    np.testing.assert_allclose(metrics["loss_before"], before.mean(), rtol=1e-4)
    values = em.evaluate(strategy, model, tasks).values["loss"]
    np.testing.assert_allclose(values[:, 0], before, rtol=1e-4)
    np.testing.assert_allclose(values[:, -1], query_loss("support", True), rtol=1e-4)


class OnlyAdapts(em.GradientStrategy):
    """A user's own algorithm, which knows nothing of statistics."""

    loss: Any
    optimizer: optax.GradientTransformation
    inner: em.InnerLoop

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        return self.inner(self.loss, model, support, key=key).model


@pytest.mark.slow
def test_a_users_own_strategy_gets_it_too():
    ours, theirs = maml(), OnlyAdapts(MSE, optax.sgd(0.1), loop())
    results = [s.outer_update(s.init(Net()), batch(), key=None) for s in (ours, theirs)]
    assert tree_allclose(results[0][0].model, results[1][0].model, rtol=1e-4, atol=1e-6)
    for name in ("loss", "loss_before"):
        np.testing.assert_allclose(results[0][1][name], results[1][1][name], rtol=1e-5)
    curves = [em.evaluate(s, Net(), batch()).values["loss"] for s in (ours, theirs)]
    np.testing.assert_allclose(curves[0][:, [0, -1]], curves[1], rtol=1e-4)
    adapted = theirs.inner_adapt(Net(), task().support)
    adapted = em.with_support_statistics(MSE, adapted, task().support)
    expected = ours.inner_adapt(Net(), task().support)
    assert tree_allclose(adapted, expected, rtol=1e-4, atol=1e-6)


def test_adapting_again_starts_without_the_old_statistics():
    first, second = examples(5, 0), examples(5, 1)
    adapted = maml().inner_adapt(Net(), first)
    bare = eqx.tree_at(lambda m: (m.norm.statistics, m.last.statistics), adapted, (None, None))
    again = maml().inner_adapt(adapted, second)
    assert tree_allclose(again, maml().inner_adapt(bare, second), rtol=0, atol=0)
    assert jax.tree.structure(maml().init(adapted).model) == jax.tree.structure(Net())
    curves = [em.evaluate(maml(), m, batch()).values["loss"] for m in (adapted, bare)]
    np.testing.assert_array_equal(*curves)


# What depends on what.


@pytest.mark.parametrize(
    ("layer", "transductive"),
    [
        (em.nn.SupportNorm, False),
        (em.nn.BatchNorm, True),
        (lambda channels: eqx.nn.GroupNorm(1, channels), False),
    ],
)
def test_whether_a_prediction_depends_on_the_other_queries(layer, transductive):
    """The first query's loss, with other queries beside it; and the result says which it is."""

    def first_loss(model, data, key):
        x, y = data
        prediction = em.losses.predict(model, x)
        errors = jnp.mean((prediction - y) ** 2, axis=1)
        return jnp.mean(errors), {"first": errors[0]}

    tasks = batch()
    x, y = tasks.query
    others = em.Task(tasks.support, (x.at[:, 1:].multiply(-3.0), y))
    more = em.Task(tasks.support, (jnp.tile(x, (1, 2, 1, 1)), jnp.tile(y, (1, 2, 1))))
    reverse = em.Task(tasks.support, (x[:, [0, 2, 1]], y[:, [0, 2, 1]]))
    strategy = maml(loss=first_loss)
    results = [em.evaluate(strategy, Net(layer), t) for t in (tasks, others, more, reverse)]
    for result in results:
        assert result.transductive is transductive
        assert f"transductive={transductive}" in repr(result)
    first = [result.values["first"] for result in results]
    same = [np.allclose(first[0], other, rtol=1e-5) for other in first[1:]]
    # Neither copies of all nor their order change the statistics of a batch.
    assert same == [not transductive, True, True]
    np.testing.assert_allclose(results[0].values["loss"], results[3].values["loss"], rtol=1e-5)


def test_the_order_of_the_support_set_does_not_matter():
    (x, y), (queries, _) = task().support, task().query
    order = np.array([3, 0, 4, 1, 2])
    models = [maml().inner_adapt(Net(), s) for s in ((x, y), (x[order], y[order]))]
    np.testing.assert_allclose(*(predict(m, queries) for m in models), atol=1e-5)


@pytest.mark.slow
def test_the_callback_publishes_what_is_transductive():
    for layer, expected in ((em.nn.SupportNorm, False), (em.nn.BatchNorm, True)):
        logged = []

        class Keep(Callback):
            def on_log(self, run, scalars, logged=logged):
                logged += scalars

        callbacks = [Evaluate(batch(), every=1), Keep()]
        trainer = em.Trainer(maml(), meta_batch_size=2, callbacks=callbacks, summary=False)
        trainer.fit(Net(layer), [jax.tree.map(np.asarray, batch())], steps=1)
        assert ("eval/transductive" in logged) is expected
        assert "eval/loss" in logged


# Gradients.


@pytest.mark.parametrize(
    "layer", [em.nn.SupportNorm, pytest.param(em.nn.BatchNorm, marks=pytest.mark.slow)]
)
def test_the_meta_gradient_flows_through_the_statistics(layer):
    check = em.check_meta_gradient(maml(steps=3), Net(layer), task())
    assert check.mixed_vs_reverse < 1e-10
    assert check.mixed_vs_finite_differences < 1e-6


def test_the_gradient_is_another_one_if_the_statistics_are_constant(x64):
    """What the finite differences above would not tell from nothing: the statistics matter."""
    model, tasks = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (Net(), task()))

    def through(model, keep):
        adapted = em.with_support_statistics(MSE, model, tasks.support)
        where = lambda m: (m.norm.statistics, m.last.statistics)  # noqa: E731
        adapted = eqx.tree_at(where, adapted, keep(where(adapted)))
        return MSE(adapted, tasks.query, None)[0]

    exact, constant = (
        jax.jit(jax.grad(through), static_argnums=1)(model, keep).conv.weight
        for keep in (lambda s: s, jax.lax.stop_gradient)
    )
    assert np.linalg.norm(exact - constant) > 0.1 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_modes_agree_in_the_outer_step(chunk):
    """Also with tasks one after another in a scan, and with blocks of inner steps remembered."""
    states = []
    for gradient, remat in (("mixed", True), ("reverse", False)):
        inner = em.InnerLoop(optax.sgd(0.1), 3, gradient, remat=remat)
        strategy = em.MAML(MSE, inner, optax.sgd(0.1), task_chunk=chunk)
        states.append(strategy.outer_update(strategy.init(Net()), batch(), key=KEY)[0])
    assert tree_allclose(states[0].model, states[1].model, rtol=1e-4, atol=1e-6)


# Models without such layers.


def test_other_models_are_returned_as_they_are():
    def never(*args):
        raise AssertionError("a forward pass was traced")

    for model in (tiny_mlp(), Net(em.nn.BatchNorm), {"w": jnp.ones(2)}):
        assert em.with_support_statistics(never, model, None) is model


# Precision.


@pytest.mark.slow
def test_half_precision_is_computed_in_float32(strict_dtypes):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Net())
    # The variance of what is large and nearly constant, in bfloat16, would be zero.
    x = (100 + jnp.arange(6.0) % 2)[:, None, None] * jnp.ones((6, 3, 1))
    out = em.losses.predict(half.norm, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[:2, 0, 0], [-1, 1], atol=0.01)
    tasks = jax.tree.map(lambda x: x.astype(jnp.bfloat16), task())
    adapted = maml().inner_adapt(half, tasks.support)
    assert adapted.norm.weight.dtype == jnp.bfloat16
    assert adapted.norm.statistics[0].dtype == jnp.float32


# What is refused.


@pytest.mark.parametrize("layer", [em.nn.SupportNorm, em.nn.BatchNorm])
def test_a_layer_needs_a_batch(layer):
    model, (x, y) = Net(layer), examples(5, 0)
    said = rf"`{layer.__name__}` normalises(.|\n)*`eqxmeta.losses.predict"
    for call in (lambda: model(x[0]), lambda: jax.vmap(model)(x)):
        with pytest.raises(ValueError, match=said):
            call()

    def own(model, data, key):
        return jnp.mean((jax.vmap(model)(data[0]) - data[1]) ** 2), {}

    for run in (
        lambda: maml(loss=own).inner_adapt(model, (x, y)),
        lambda: em.Trainer(maml(loss=own), meta_batch_size=2).fit(
            model, [jax.tree.map(np.asarray, batch())], steps=1
        ),
        lambda: em.with_support_statistics(own, model, (x, y))(x[0]),
    ):
        with pytest.raises(ValueError, match=said):
            run()


def test_a_single_value_has_no_variance():
    norm = em.nn.SupportNorm(2)
    with pytest.raises(ValueError, match="single value" + THREE_PARTS):
        em.losses.predict(norm, jnp.ones((1, 2)))
    assert em.losses.predict(norm, jnp.ones((1, 2, 2))).shape == (1, 2, 2)


class Wrapped(eqx.Module):
    net: Net
    how: str

    def __call__(self, x):
        net = self.net
        if self.how == "twice":
            return net.last(net(x))
        if self.how == "checkpoint":
            return jax.checkpoint(lambda x: net(x))(x)
        if self.how == "jit":
            return jax.jit(lambda x: net(x))(x)
        return jax.lax.scan(lambda c, _: (net(x), None), jnp.zeros(2), length=2)[0]


@pytest.mark.parametrize("how", ["twice", "checkpoint", "jit", "scan"])
def test_statistics_that_cannot_be_found(how):
    with pytest.raises(ValueError, match="statistics" + THREE_PARTS):
        maml().inner_adapt(Wrapped(Net(), how), examples(5, 0))


def jitted(model, data, key):
    return eqx.filter_jit(MSE)(model, data, key)


def predicted_twice(model, data, key):
    return MSE(model, data, key)[0] + MSE(model, data, key)[0], {}


@pytest.mark.parametrize("loss", [jitted, predicted_twice])
def test_losses_whose_statistics_cannot_be_found(loss):
    with pytest.raises(ValueError, match="statistics" + THREE_PARTS):
        maml(loss=loss).inner_adapt(Net(), examples(5, 0))


def test_a_layer_that_the_support_set_does_not_use():
    def support_without_last(model, data, key):
        if len(data[0]) == 5:
            model = eqx.tree_at(lambda m: m.last, model, eqx.nn.Identity())
        return MSE(model, data, key)

    strategy = maml(loss=support_without_last)
    with pytest.raises(ValueError, match="has no statistics of the support set" + THREE_PARTS):
        strategy.outer_update(strategy.init(Net()), batch(), key=None)


def test_a_loss_may_cast_the_model():
    def loss(model, data, key):
        model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        return MSE(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), data), key)

    adapted = maml(loss=loss).inner_adapt(Net(), examples(5, 0))
    assert adapted(examples(1, 3)[0][0]).dtype == jnp.float32


def test_channels_must_match():
    with pytest.raises(ValueError, match="number of channels" + THREE_PARTS):
        em.losses.predict(em.nn.SupportNorm(3), jnp.ones((5, 2)))
    for layer in (em.nn.SupportNorm, em.nn.BatchNorm):
        with pytest.raises(ValueError, match="too small" + THREE_PARTS):
            layer(0)
