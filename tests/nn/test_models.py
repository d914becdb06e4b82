"""The backbones: shapes, published sizes and initial weights, and what they compute."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import equations
from eqxmeta.nn._resnet12 import _Block

from ..helpers import tree_allclose

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
NORMS = ("support", "batch", "layer", "group")
predict = eqx.filter_jit(em.losses.predict)


def shapes_of(make):
    return eqx.filter_eval_shape(make)


def count(model) -> int:
    return sum(x.size for x in jax.tree.leaves(model) if hasattr(x, "dtype"))


@pytest.mark.parametrize(
    ("make", "image", "features", "parameters"),
    [
        # Each convolution 9 * in * out + out, each norm 2 * out, the head (features + 1) * ways.
        (
            lambda: em.nn.Conv4(1, 5, key=KEY),
            (1, 28, 28),
            64,
            (9 + 3 * 9 * 64) * 64 + 4 * 3 * 64 + 65 * 5,
        ),
        (
            lambda: em.nn.Conv4(3, 5, size=84, width=64, norm="layer", key=KEY),
            (3, 84, 84),
            1600,
            (27 + 3 * 9 * 64) * 64 + 4 * 3 * 64 + 1601 * 5,
        ),
        # MAML's on miniImageNet: 32 filters, 800 features.
        (
            lambda: em.nn.Conv4(3, 5, size=84, width=32, norm="batch", key=KEY),
            (3, 84, 84),
            800,
            32901,
        ),
        (
            lambda: em.nn.OmniglotFC(784, 5, key=KEY),
            (28, 28),
            64,
            785 * 256 + 257 * 128 + 129 * 64 + 65 * 64 + 512 + 65 * 5,
        ),
        # 12.4 million, as the papers say.
        (lambda: em.nn.ResNet12(3, 5, key=KEY), (3, 84, 84), 640, 12_424_320 + 641 * 5),
        (lambda: em.nn.ResNet12(1, 5, norm="group", key=KEY), (1, 28, 28), 640, None),
    ],
)
def test_shapes_and_published_sizes(make, image, features, parameters):
    model = shapes_of(make)
    x = jax.ShapeDtypeStruct((7, *image), jnp.float32)
    assert shapes_of_call(em.losses.predict, model, x) == (7, 5)
    assert shapes_of_call(lambda m, x: em.losses.predict(m.features, x), model, x) == (7, features)
    if parameters is not None:
        assert count(model) == parameters


def shapes_of_call(fun, *args):
    return eqx.filter_eval_shape(fun, *args).shape


@pytest.mark.parametrize(
    "make",
    [
        lambda ways: em.nn.Conv4(1, ways, width=4, key=KEY),
        lambda ways: em.nn.OmniglotFC(784, ways, key=KEY),
        lambda ways: em.nn.ResNet12(1, ways, key=KEY),
    ],
)
def test_without_a_head_the_output_is_the_features(make):
    model, x = shapes_of(lambda: make(None)), jax.ShapeDtypeStruct((2, 1, 28, 28), jnp.float32)
    assert model.head is None
    out = shapes_of_call(em.losses.predict, model, x)
    assert out == shapes_of_call(lambda m, x: em.losses.predict(m.features, x), model, x)


def test_initial_weights_are_the_published_ones():
    @eqx.filter_jit
    def some_layers():  # compiled, so that of all layers only these are drawn
        conv4 = em.nn.Conv4(3, 5, size=84, key=KEY)
        fc = em.nn.OmniglotFC(784, 5, key=KEY).layers[0]
        block = _Block(64, 160, "support", KEY)
        return conv4.blocks[1].conv, conv4.head, fc, block.convs[1], block.shortcut

    conv, head, fc, second, shortcut = some_layers()
    for layer, fans in ((conv, 2 * 9 * 64), (head, 1605)):
        assert np.all(np.asarray(layer.bias) == 0)
        limit = np.sqrt(6 / fans)
        weight = np.asarray(layer.weight)
        np.testing.assert_allclose(np.abs(weight).max(), limit, rtol=0.02)
        np.testing.assert_allclose(weight.std(), limit / np.sqrt(3), rtol=0.03)
    # A normal distribution cut at two standard deviations has 0.88 of its standard deviation.
    np.testing.assert_allclose(np.asarray(fc.weight).std(), 0.01 * 0.8796, rtol=0.01)
    assert np.abs(fc.weight).max() <= 0.02 and np.all(np.asarray(fc.bias) == 0)
    for layer, fan_out in ((second, 9 * 160), (shortcut, 160)):
        assert layer.bias is None
        np.testing.assert_allclose(np.asarray(layer.weight).std(), (2 / fan_out) ** 0.5, rtol=0.02)


def conv_by_numpy(x, conv):
    """3x3, padding 1: `[n, c, h, w] -> [n, k, h, w]`."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    bias = 0 if conv.bias is None else np.asarray(conv.bias)
    return np.einsum("nchwij,kcij->nkhw", windows, np.asarray(conv.weight)) + bias


def pool_by_numpy(x):
    n, c, h, w = x.shape
    x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
    return x.max((3, 5))


def norm_by_numpy(x):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5)


@pytest.mark.parametrize("size", [pytest.param(28, marks=pytest.mark.slow), 21])
def test_conv4_by_hand(size):
    """In the papers' order: convolution, norm, relu, pool."""
    model = em.nn.Conv4(2, 3, size=size, width=4, key=KEY)
    images = jax.random.normal(jax.random.key(1), (6, 2, size, size))
    x = np.asarray(images)
    for block in model.blocks:
        x = pool_by_numpy(np.maximum(norm_by_numpy(conv_by_numpy(x, block.conv)), 0))
    expected = x.reshape(6, -1) @ np.asarray(model.head.weight).T + np.asarray(model.head.bias)
    np.testing.assert_allclose(predict(model, images), expected, atol=1e-4)


def test_a_residual_block_by_hand():
    block = _Block(2, 4, "support", KEY)
    images = jax.random.normal(jax.random.key(1), (5, 2, 6, 6))
    x = y = np.asarray(images)

    def leaky(z):
        return np.where(z > 0, z, 0.1 * z)

    for i, conv in enumerate(block.convs):
        y = norm_by_numpy(conv_by_numpy(y, conv))
        y = leaky(y) if i < 2 else y
    shortcut = np.einsum("nchw,kc->nkhw", x, np.asarray(block.shortcut.weight)[:, :, 0, 0])
    expected = pool_by_numpy(leaky(y + norm_by_numpy(shortcut)))
    found = predict(block, jnp.moveaxis(images, 1, -1))  # channels last
    np.testing.assert_allclose(jnp.moveaxis(found, -1, 1), expected, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_block_is_its_layers_with_the_channels_last(norm):
    block = em.nn.Conv4(2, None, width=6, norm=norm, key=KEY).blocks[0]
    block = eqx.tree_at(lambda b: b.norm.weight, block, jnp.arange(6.0))
    images = jax.random.normal(jax.random.key(1), (5, 2, 6, 7))

    def channels_first(x):
        return jax.nn.relu(block.pool(block.norm(block.conv(x))))

    found = predict(block, jnp.moveaxis(images, 1, -1))
    expected = predict(channels_first, images)
    np.testing.assert_allclose(jnp.moveaxis(found, -1, 1), expected, atol=1e-5)


def turned(fun, x):
    """The shapes of the arrays that `fun` transposes, axes of one element left out."""
    found = []
    for eqn in equations(jax.make_jaxpr(fun)(x).jaxpr):
        if eqn.primitive.name == "transpose":
            shape = eqn.invars[0].aval.shape
            order = [axis for axis in eqn.params["permutation"] if shape[axis] != 1]
            if order != sorted(order):
                found.append(tuple(n for n in shape if n != 1))
    return found


def test_a_backbone_turns_its_images_once():
    model = em.nn.Conv4(2, 3, size=16, width=4, key=KEY)
    found = turned(lambda x: em.losses.predict(model, x), jnp.ones((5, 2, 16, 16)))
    weights = [(4, 2, 3, 3), *[(4, 4, 3, 3)] * 3]
    assert sorted(found) == sorted([(5, 2, 16, 16), *weights])


def image_tasks(num_tasks: int, seed: int = 0, size: int = 16) -> em.Task:
    """Classes 0 to 2 of square images: a pattern each, with noise."""

    def draw(n, seed):
        rng = np.random.default_rng(seed)
        y = np.tile(np.arange(3), (num_tasks, n))
        patterns = rng.normal(size=(num_tasks, 3, 1, size, size))
        x = patterns[np.arange(num_tasks)[:, None], y] + 0.5 * rng.normal(
            size=(num_tasks, 3 * n, 1, size, size)
        )
        return jnp.asarray(x), jnp.asarray(y, jnp.int32)

    # The same generator draws the patterns first: the same in both.
    return em.Task(draw(1, seed), draw(2, seed))


class OneBlock(eqx.Module):
    """Of a Conv4 the first block, with a head: `[1, size, size] -> [3]`."""

    block: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, size: int):
        self.block = em.nn.Conv4(1, None, width=2, key=KEY).blocks[0]
        self.head = eqx.nn.Linear(2 * (size // 2) ** 2, 3, key=KEY)

    def __call__(self, x):
        return self.head(jnp.ravel(self.block(jnp.moveaxis(x, 0, -1))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (OneBlock, 4),
        pytest.param(
            lambda size: em.nn.Conv4(1, 3, size=size, width=4, key=KEY), 16, marks=pytest.mark.slow
        ),
    ],
    ids=["one block", "Conv4"],
)
def test_mixed_and_reverse_are_the_same_run_on_a_convnet(make, size, x64):
    """To rounding, with max-pooling, over several outer steps."""
    model = make(size)
    model = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_array(x) else x, model)
    runs = {}
    for gradient in ("mixed", "reverse"):
        inner = em.InnerLoop(optax.sgd(0.4), 2, gradient)
        strategy = em.MAML(em.losses.cross_entropy, inner, optax.adam(1e-2))
        state, losses = strategy.init(model), []
        for i in range(3):
            state, metrics = strategy.outer_update(state, image_tasks(2, i, size), key=None)
            losses.append(float(metrics["loss"]))
        runs[gradient] = state, losses
    np.testing.assert_allclose(runs["mixed"][1], runs["reverse"][1], rtol=1e-9)
    assert tree_allclose(runs["mixed"][0].model, runs["reverse"][0].model, rtol=1e-7, atol=1e-9)
    assert not tree_allclose(runs["mixed"][0].model, model, rtol=1e-2)


@pytest.mark.slow
def test_an_adapted_conv4_classifies_one_image_in_half_precision():
    model = em.nn.Conv4(1, 3, size=16, width=2, key=KEY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    task = jax.tree.map(lambda x: x[0], image_tasks(1))
    (x, y), (queries, _) = task.support, task.query
    x, queries = x.astype(jnp.bfloat16), queries.astype(jnp.bfloat16)
    inner = em.InnerLoop(optax.sgd(0.4), 1)
    adapted = em.MAML(em.losses.cross_entropy, inner, optax.sgd(0.1)).inner_adapt(half, (x, y))
    logits = eqx.filter_jit(lambda model, x: model(x))(adapted, queries[0])
    assert logits.dtype == jnp.bfloat16 and logits.shape == (3,)


@pytest.mark.parametrize("norm", NORMS)
def test_each_policy_by_its_name(norm):
    model = em.nn.Conv4(1, 3, size=16, width=6, norm=norm, key=KEY)
    expected = {"support": em.nn.SupportNorm, "batch": em.nn.BatchNorm}
    for block in model.blocks:
        assert type(block.norm) is expected.get(norm, eqx.nn.GroupNorm)
    if norm in ("layer", "group"):
        assert model.blocks[0].norm.groups == {"layer": 1, "group": 2}[norm]
        assert shapes_of_call(model, jnp.ones((1, 16, 16))) == (3,)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: em.nn.Conv4(1, 5, norm="instance", key=KEY), ValueError, r"Conv4\(norm"),
        (lambda: em.nn.Conv4(1, 5, size=15, key=KEY), ValueError, r"Conv4\(size"),
        (lambda: em.nn.Conv4(1, 0, key=KEY), ValueError, r"Conv4\(ways"),
        (lambda: em.nn.OmniglotFC(0, 5, key=KEY), ValueError, r"OmniglotFC\(inputs"),
        (lambda: em.nn.ResNet12(0, 5, key=KEY), ValueError, r"ResNet12\(channels"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_arguments_are_checked(make, error, said):
    with pytest.raises(error, match=said + THREE_PARTS):
        make()


@pytest.mark.usefixtures("as_users_run_it")
def test_images_of_another_shape_are_refused():
    model = shapes_of(lambda: em.nn.Conv4(1, 5, key=KEY))
    for shape in ((28, 28), (28, 28, 1), (1, 84, 84)):
        with pytest.raises(ValueError, match="another shape" + THREE_PARTS):
            shapes_of_call(em.losses.predict, model, jnp.ones((2, *shape)))
    network = shapes_of(lambda: em.nn.OmniglotFC(784, 5, norm="layer", key=KEY))
    with pytest.raises(ValueError, match=r"another size[\s\S]*400 values[\s\S]*784 values"):
        shapes_of_call(network, jnp.ones((1, 20, 20)))


@pytest.mark.usefixtures("as_users_run_it")
def test_an_image_too_small_for_resnet12_is_refused():
    model = shapes_of(lambda: em.nn.ResNet12(1, 5, norm="layer", key=KEY))
    for shape in ((1, 15, 16), (1, 16, 8)):
        with pytest.raises(ValueError, match="too small" + THREE_PARTS):
            eqx.filter_eval_shape(model, jnp.ones(shape))
    assert eqx.filter_eval_shape(model, jnp.ones((1, 16, 16))).shape == (5,)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_image_of_numpy_is_an_image():
    """Divided by 255 it is of float64, which is JAX's own float to JAX."""
    model = em.nn.Conv4(1, 3, size=16, width=2, norm="layer", key=KEY)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16)) / 255
    # Both are constants of one program: an argument of `jit` would not be of NumPy any more.
    found, expected = jax.jit(lambda: (model(image), model(jnp.asarray(image))))()
    assert tree_allclose(found, expected)
