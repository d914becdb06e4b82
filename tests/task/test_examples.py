"""Batches with weights: means against NumPy, and padding that cannot be seen in anything."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em
from eqxmeta.losses import cross_entropy, examples, mse, predict

from ..helpers import tree_allclose

THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
WEIGHT = np.array([1.0, 0.0, 2.5, 0.0, 0.5], np.float32)
RNG = np.random.default_rng(0)


class Direction(eqx.Module):
    """`x: [3] -> [4]`: divides by the length, NaN for an example of zeros."""

    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ (x / jnp.sqrt(jnp.sum(x**2)))


MODEL = Direction(jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32))


def outputs(x):
    return (np.asarray(MODEL.matrix, float) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T).T


def batch(targets, padding):
    """Five examples, of which two are padding of those values."""
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    x[WEIGHT == 0] = padding
    return jnp.asarray(x), jnp.asarray(targets), jnp.asarray(WEIGHT)


def test_mse_is_the_weighted_mean():
    x, y, w = batch(RNG.normal(size=(5, 4)).astype(np.float32), 1.0)
    value, metrics = mse(MODEL, (x, y, w), None)
    expected = np.average(((outputs(x) - y) ** 2).mean(axis=1), weights=w)
    assert value.dtype == jnp.float32 and metrics == {}
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cross_entropy_and_accuracy_are_weighted_means_over_the_classes_of_the_task():
    labels = np.array([1, 0, 0, 0, 2])
    x, y, w = batch(labels, 1.0)
    value, metrics = cross_entropy(MODEL, (x, y, w), None)
    logits = outputs(x)[:, :3]  # the model has a fourth class, and the task has not
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), labels]
    np.testing.assert_allclose(value, np.average(losses, weights=w), rtol=1e-5)
    hits = logits.argmax(axis=1) == labels
    np.testing.assert_allclose(metrics["accuracy"], np.average(hits, weights=w), rtol=1e-6)


def test_a_label_of_weight_zero_says_that_there_is_a_class():
    x, _, w = batch([1, 0, 0, 0, 1], 1.0)
    few, more = (cross_entropy(MODEL, (x, jnp.array([1, k, 0, 0, 1]), w), None)[0] for k in (0, 3))
    assert few < more
    np.testing.assert_allclose(
        more, cross_entropy(MODEL, (x, jnp.array([1, 3, 0, 0, 1]), w), None)[0]
    )


@pytest.mark.parametrize("padding", [0.0, 3e38, np.nan])
@pytest.mark.parametrize("loss", [mse, cross_entropy])
def test_padding_is_nothing_whatever_it_holds(loss, padding):
    """Zeros are NaN to this model, and so would be their gradient, times zero."""
    targets = [2, 0, 3, 0, 1]
    if loss is mse:
        targets = RNG.normal(size=(5, 4)).astype(np.float32)
        targets[WEIGHT == 0] = padding
    x, y, w = batch(targets, padding)
    kept = np.flatnonzero(WEIGHT)
    padded, cut = (
        jax.jit(jax.value_and_grad(lambda m, b: loss(m, b, None), has_aux=True))(MODEL, b)
        for b in ((x, y, w), (x[kept], y[kept], w[kept]))
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(padded))
    assert tree_allclose(padded, cut, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [mse, cross_entropy])
def test_a_real_example_that_is_nan_is_seen(loss):
    targets = [2, 0, 3, 0, 1] if loss is cross_entropy else np.ones((5, 4), np.float32)
    x, y, w = batch(targets, 0.0)
    assert np.isnan(loss(MODEL, (x.at[2].set(jnp.nan), y, w), None)[0])


def test_a_label_that_is_no_class_gives_nan_unless_it_is_of_padding():
    x, _, w = batch([0] * 5, 1.0)
    for labels, nan in (
        ([0, -1, 1, 0, 2], False),
        ([0, 0, -1, 0, 2], True),
        ([9, 0, 1, 0, 2], True),
    ):
        value, metrics = cross_entropy(MODEL, (x, jnp.array(labels), w), None)
        assert bool(jnp.isnan(value)) is bool(jnp.isnan(metrics["accuracy"])) is nan


@pytest.mark.parametrize("norm", [em.nn.SupportNorm, em.nn.BatchNorm])
def test_statistics_are_weighted(norm):
    layer = norm(2)
    x = RNG.normal(size=(5, 2, 3, 3)).astype(np.float32)
    out = predict(layer, jnp.asarray(x), None, jnp.asarray(WEIGHT))
    wide = x.astype(float)
    mean = np.average(wide.mean(axis=(2, 3)), axis=0, weights=WEIGHT)[:, None, None]
    variance = np.average(((wide - mean) ** 2).mean(axis=(2, 3)), axis=0, weights=WEIGHT)
    expected = (wide - mean) / np.sqrt(variance[:, None, None] + 1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_queries_are_normalised_by_the_weighted_statistics():
    layer = em.nn.SupportNorm(3)
    x, _, w = batch([0] * 5, 7.0)
    found, model = em.features(layer, x, weight=w)
    np.testing.assert_allclose(found, predict(layer, x, None, w))
    told = em.with_support_statistics(mse, layer, (x, x, w))
    for one in (model, told):
        np.testing.assert_allclose(jax.vmap(one)(x), found, rtol=1e-6)


def test_weights_are_not_carried_into_a_transformation_in_silence():
    layer = em.nn.BatchNorm(3)
    x, _, w = batch([0] * 5, 1.0)
    with pytest.raises(ValueError, match="weights of the examples" + THREE_PARTS):
        predict(lambda x: eqx.filter_jit(layer)(x), x, None, w)


def test_without_weights_there_are_none():
    x, y = jnp.ones((2, 3)), jnp.zeros(2, int)
    assert examples((x, y))[2] is None


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("weight", [jnp.ones(4), jnp.ones((5, 1)), jnp.ones(5, int), 1.0, None])
def test_malformed_weights_are_refused(weight):
    x, y, _ = batch([0] * 5, 1.0)
    with pytest.raises((TypeError, ValueError), match="[Ww]eights" + THREE_PARTS):
        cross_entropy(MODEL, (x, y, weight), None)
