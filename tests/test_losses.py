import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta._types import Loss
from eqxmeta.losses import cross_entropy, gaussian_nll, mse, predict, sigmoid_mse

from .helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def identity(x):
    return x


def reference_cross_entropy(logits, labels):
    """In float64, one example after another."""
    total = 0.0
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        total -= np.log(np.exp(row[label]) / np.exp(row).sum())
    return total / len(labels)


def test_both_are_losses():
    assert isinstance(mse, Loss)
    assert isinstance(cross_entropy, Loss)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_mse_is_the_mean_over_examples_and_outputs(shape):
    x, y = normal(*shape), normal(*shape, seed=1)
    value, metrics = mse(identity, (jnp.asarray(x), jnp.asarray(y)), None)
    assert value.shape == () and value.dtype == jnp.float32 and metrics == {}
    assert float(value) == pytest.approx(np.square(x.astype(float) - y).sum() / x.size, rel=1e-5)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_cross_entropy_and_accuracy(dtype):
    logits = 3 * normal(40, 5)
    labels = np.random.default_rng(1).integers(0, 5, 40)
    batch = jnp.asarray(logits), jnp.asarray(labels, dtype)
    value, metrics = jax.jit(lambda batch: cross_entropy(identity, batch, None))(batch)
    assert value.shape == () and value.dtype == jnp.float32
    assert float(value) == pytest.approx(reference_cross_entropy(logits, labels), rel=1e-5)
    right = sum(
        max(range(5), key=row.__getitem__) == y for row, y in zip(logits, labels, strict=True)
    )
    assert set(metrics) == {"accuracy"}
    assert float(metrics["accuracy"]) == pytest.approx(right / 40)


def test_large_logits_stay_finite():
    value, _ = cross_entropy(identity, (jnp.array([[1e4, 0.0]]), jnp.array([1])), None)
    assert float(value) == pytest.approx(1e4)


def test_a_nan_among_the_logits_is_no_accuracy():
    """Wherever the NaN is; infinities are numbers like others."""
    nan, inf = np.nan, np.inf

    def accuracy(*logits):
        labels = jnp.array([0, 1, 0])
        return float(cross_entropy(identity, (jnp.array(logits), labels), None)[1]["accuracy"])

    assert accuracy([inf, 0], [-inf, 0], [0, inf]) == pytest.approx(2 / 3)
    for row in ([nan, nan], [1, nan], [nan, 1]):
        assert np.isnan(accuracy([inf, 0], row, [0, inf]))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_gives_nan(label):
    value, metrics = cross_entropy(identity, (jnp.ones((2, 3)), jnp.array([0, label])), None)
    assert np.isnan(value)
    assert np.isnan(metrics["accuracy"])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_gives_a_gradient_of_nan(label):
    """For its example only. Nothing that is finite would be right, and a run goes on with it."""
    labels = jnp.array([0, label])

    def loss(logits, labels):
        return cross_entropy(identity, (logits, labels), None)[0]

    logits = jnp.asarray(normal(2, 3))
    grads = jax.jit(jax.grad(loss))(logits, labels)
    assert np.isnan(grads[1]).all()
    right = jax.jit(jax.grad(loss))(logits, jnp.array([0, 1]))
    assert tree_allclose(grads[0], right[0], rtol=0, atol=0)
    product = jax.jit(lambda x, y: jax.jvp(lambda x: jax.grad(loss)(x, y), (x,), (x,))[1])
    curved = product(logits, labels)
    assert np.isnan(curved[1]).all() and np.isfinite(curved[0]).all()


@pytest.mark.usefixtures("strict_dtypes")
def test_sigmoid_mse_is_that_of_relations():
    """Equation 2 of Sung et al. 2018, summed over classes; one that is not there has no part."""
    logits, labels = normal(7, 4), np.random.default_rng(1).integers(0, 3, 7)
    logits[:, 3] = -np.inf
    value, metrics = sigmoid_mse(identity, (jnp.asarray(logits), jnp.asarray(labels)), None)
    relations = 1 / (1 + np.exp(-logits[:, :3].astype(float)))
    expected = sum((relations[i, k] - (k == labels[i])) ** 2 for i in range(7) for k in range(3))
    np.testing.assert_allclose(value, expected / 7, rtol=1e-5)
    accuracy = np.mean(logits.argmax(axis=1) == labels)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    grads = jax.grad(lambda x: sigmoid_mse(identity, (x, jnp.asarray(labels)), None)[0])(logits)
    assert np.isfinite(grads).all() and not grads[:, 3].any()
    assert np.isnan(sigmoid_mse(identity, (jnp.ones((2, 3)), jnp.array([0, 3])), None)[0])


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.5, 0.0]])
def test_gaussian_nll(weight):
    """Of padding the target is NaN."""
    mean, y, scale = normal(4, 3), normal(4, 3, seed=1), np.exp(normal(4, 3, seed=2))
    wide = [x.astype(float) for x in (mean, y, scale)]
    if weight is not None:
        y[[1, 3]] = np.nan
    rest = () if weight is None else (jnp.asarray(weight, jnp.float32),)

    def loss(mean, scale):
        batch = (jnp.asarray(mean), jnp.asarray(scale)), jnp.asarray(y), *rest
        return gaussian_nll(lambda pair: (pair[0], pair[1]), batch, None)

    (value, metrics), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(mean, scale)
    m, t, s = wide
    losses = -np.log(np.exp(-(((t - m) / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi)))
    for found, each in ((value, losses), (metrics["mse"], (t - m) ** 2)):
        expected = np.average(each.mean(axis=1), weights=weight)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert value.dtype == jnp.float32 and metrics.keys() == {"mse"}
    assert all(np.isfinite(g).all() for g in grads)


def test_gaussian_nll_wants_a_mean_and_a_scale_of_each_target():
    x = jnp.ones((4, 2))
    with pytest.raises(TypeError, match="not a pair" + THREE_PARTS):
        gaussian_nll(identity, (x, x), None)
    with pytest.raises(ValueError, match="differ in shape" + THREE_PARTS):
        gaussian_nll(lambda x: (x, x[:1]), (x, x), None)


@pytest.mark.parametrize(
    ("prediction", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 1)), ((4, 1), (3, 1))]
)
def test_mse_never_broadcasts(prediction, target):
    batch = jnp.ones(prediction), jnp.ones(target)
    with pytest.raises(ValueError, match=THREE_PARTS) as caught:
        jax.eval_shape(lambda batch: mse(identity, batch, None), batch)
    assert str(prediction) in str(caught.value) and str(target) in str(caught.value)


def test_mse_of_class_numbers_names_the_loss_for_them():
    with pytest.raises(ValueError, match="cross_entropy"):
        mse(identity, (jnp.ones((4, 5)), jnp.zeros(4, jnp.int32)), None)


@pytest.mark.parametrize(
    ("logits", "labels"), [((4,), (4,)), ((4, 5), (4, 1)), ((4, 5), (3,)), ((4, 5, 2), (4, 5))]
)
def test_cross_entropy_wants_logits_and_labels_that_match(logits, labels):
    batch = jnp.ones(logits), jnp.zeros(labels, jnp.int32)
    with pytest.raises(ValueError, match=THREE_PARTS):
        jax.eval_shape(lambda batch: cross_entropy(identity, batch, None), batch)


def test_cross_entropy_wants_integers():
    with pytest.raises(TypeError, match=THREE_PARTS):
        cross_entropy(identity, (jnp.ones((4, 5)), jnp.zeros(4)), None)


@pytest.mark.parametrize("batch", [jnp.ones((2, 3)), (jnp.ones(3),), {"x": 1, "y": 2}])
def test_a_batch_is_a_pair(batch):
    with pytest.raises(TypeError, match="not a pair" + THREE_PARTS):
        mse(identity, batch, None)


def test_a_model_of_several_outputs_is_an_error():
    with pytest.raises(TypeError, match="Predictions are not an " + THREE_PARTS):
        mse(lambda x: (x, x), (jnp.ones(3), jnp.ones(3)), None)


def test_bfloat16_parameters_with_float32_data():
    model = tiny_mlp(KEY)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    x, y = jnp.asarray(normal(8, 1)), jnp.asarray(normal(8, 1, seed=1))
    step = eqx.filter_jit(eqx.filter_value_and_grad(mse, has_aux=True))
    (value, _), grads = step(half, (x, y), None)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(mse(model, (x, y), None)[0]), rel=0.05)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_half_precision_outputs_are_widened():
    logits = normal(64, 10).astype(jnp.bfloat16)
    labels = np.random.default_rng(1).integers(0, 10, 64)
    value, _ = cross_entropy(identity, (jnp.asarray(logits), jnp.asarray(labels)), None)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(reference_cross_entropy(logits, labels), rel=1e-5)


@pytest.mark.usefixtures("strict_dtypes")
def test_float64_stays_float64(x64):
    x, y = jnp.asarray(normal(8, 3), jnp.float64), jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1])
    assert mse(identity, (x, x + 1), None)[0].dtype == jnp.float64
    value, _ = cross_entropy(identity, (x, y), None)
    assert value.dtype == jnp.float64
    assert float(value) == pytest.approx(reference_cross_entropy(np.asarray(x), y), rel=1e-12)


class Noisy(eqx.Module):
    """Takes a key, as dropout does."""

    def __call__(self, x, *, key=None):
        return x if key is None else x + jax.random.normal(key, x.shape)


class NoisyKwargs(eqx.Module):
    def __call__(self, x, **kwargs):
        return Noisy()(x, **kwargs)


@pytest.mark.parametrize("model", [Noisy(), NoisyKwargs(), Noisy().__call__])
def test_each_example_has_a_key_of_its_own(model):
    noise = predict(model, jnp.zeros((500, 2)), KEY)
    assert len(np.unique(noise)) == 1000
    assert tree_allclose(noise, predict(model, jnp.zeros((500, 2)), KEY))
    assert float(mse(model, (jnp.zeros(500), jnp.zeros(500)), KEY)[0]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("model", [Noisy(), NoisyKwargs()])
def test_without_a_key_models_are_called_without(model):
    assert not np.any(predict(model, jnp.zeros((5, 2))))
    assert float(mse(model, (jnp.zeros(5), jnp.zeros(5)), None)[0]) == 0


def test_models_that_take_no_key_are_not_given_one():
    x = jnp.asarray(normal(6, 1))
    model = tiny_mlp(KEY)
    assert tree_allclose(predict(model, x, KEY), jax.vmap(model)(x))
    assert tree_allclose(predict(lambda x, key=0, /: x + key, x, KEY), x)
    assert tree_allclose(predict(jnp.sin, x, KEY), jnp.sin(x))


def test_inputs_may_be_a_pytree():
    x = {"a": jnp.ones((4, 2)), "b": jnp.arange(4.0)}
    out = predict(lambda x, key: x["a"].sum() * x["b"], x, KEY)
    assert tree_allclose(out, 2 * jnp.arange(4.0))


@pytest.mark.usefixtures("as_users_run_it")
def test_bytes_are_refused_where_nobody_scales_them():
    """A linear layer would take a pixel of 255 for 255, where tasks have 1."""
    x = np.full((2, 1), 255, np.uint8)
    for call in (lambda: predict(tiny_mlp(), x), lambda: mse(tiny_mlp(), (x, normal(2, 1)), None)):
        with pytest.raises(TypeError, match=rf"was given bytes{THREE_PARTS}") as caught:
            call()
        assert "uint8 [2, 1]" in str(caught.value) and "x / 255" in str(caught.value)
    assert predict(tiny_mlp(), x / np.float32(255)).shape == (2, 1)
