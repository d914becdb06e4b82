"""`em.nn.Conv2d` against `eqx.nn.Conv2d`: values, first and second derivatives, under `vmap`, in
loops; and that what is compiled from it has no convolution in it."""

import os
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import count_flops
from eqxmeta.nn import _bilinear

from ..helpers import tree_allclose

OPTIONS = {
    "plain": dict(kernel_size=3, padding=1),
    "uneven": dict(kernel_size=(3, 2), padding=((2, 1), (0, 3)), stride=(2, 1), dilation=(1, 2)),
    "split": dict(kernel_size=(4, 3), padding=((2, -1), (0, 3)), stride=(1, 2), dilation=(2, 1)),
    "beyond": dict(kernel_size=3, padding=((0, 10), (9, 0)), dilation=4),
    "groups": dict(kernel_size=2, stride=3, groups=2, use_bias=False),
    "same": dict(kernel_size=3, padding="SAME", stride=2),
    "same_lower": dict(kernel_size=2, padding="SAME_LOWER"),
    "reflect": dict(kernel_size=3, padding="SAME", padding_mode="REFLECT", groups=2, dilation=2),
    "cropped": dict(kernel_size=1, padding=((-1, 0), (0, -2))),
}


def pair(**options):
    make = [cls(4, 6, key=jax.random.key(0), **options) for cls in (eqx.nn.Conv2d, em.nn.Conv2d)]
    return (*make, jax.random.normal(jax.random.key(1), (2, 4, 7, 6)))


def loss(layer, x):
    return jnp.sum(jnp.sin(jax.vmap(layer)(x)))


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def everything(layer, x):
    """Values, gradients, and Hessian products forward over reverse and reverse over reverse."""
    arrays, static = eqx.partition(layer, eqx.is_array)
    args = (leaves(arrays), x)

    def fun(args):
        return loss(
            eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), args[0]), static), args[1]
        )

    along = jax.tree.map(
        lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), args
    )
    grads, forward = jax.jvp(jax.grad(fun), (args,), (along,))

    def slope(args):
        return optax.tree.vdot(jax.grad(fun)(args), along)

    return jax.vmap(layer)(x), grads, forward, jax.grad(slope)(args)


def slow_but(*fast):
    """The names of all options, of which only these are run by default."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in OPTIONS]


def test_values_are_those_of_equinox(x64):
    """With every option; in one program, which is compiled once."""
    pairs = {name: pair(**options) for name, options in OPTIONS.items()}

    @jax.jit
    def values(x):
        return {
            name: [jax.vmap(layer)(x) for layer in layers] for name, (*layers, _) in pairs.items()
        }

    for theirs, ours in values(pairs["plain"][-1]).values():
        assert tree_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", slow_but("split", "groups"))
def test_values_and_derivatives_are_those_of_equinox(name, x64):
    theirs, ours, x = pair(**OPTIONS[name])
    assert tree_allclose(leaves(theirs), leaves(ours), rtol=0, atol=0)
    expected = jax.jit(lambda x: everything(theirs, x))(x)
    found = jax.jit(lambda x: everything(ours, x))(x)
    assert tree_allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert tree_allclose(found[2], found[3], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", pytest.param("uneven", marks=pytest.mark.slow)])
def test_under_vmap_over_weights_and_inside_a_scan(name, x64):
    theirs, ours, x = pair(**OPTIONS[name])

    def adapt(layer, scale):
        arrays, static = eqx.partition(layer, eqx.is_array)

        def step(arrays, _):
            grads = jax.grad(lambda a: loss(eqx.combine(a, static), scale * x))(arrays)
            return jax.tree.map(lambda a, g: a - 0.1 * g, arrays, grads), None

        return loss(eqx.combine(jax.lax.scan(step, arrays, None, length=2)[0], static), x)

    def total(layer):
        return jnp.sum(jax.vmap(lambda s: adapt(layer, s))(jnp.array([0.5, 1.0, 2.0])))

    expected, found = (leaves(eqx.filter_jit(eqx.filter_grad(total))(m)) for m in (theirs, ours))
    assert tree_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_gradients_of_single_examples(x64):
    theirs, ours, x = pair(**OPTIONS["plain"])

    def each(layer):
        return leaves(jax.vmap(lambda x: eqx.filter_grad(loss)(layer, x[None]))(x))

    assert tree_allclose(each(ours), each(theirs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ensemble, examples", [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_ensemble_of_none_and_a_batch_of_none(ensemble, examples, stride):
    layer = em.nn.Conv2d(4, 6, 3, stride, 1, key=jax.random.key(0))
    weights = jnp.zeros((ensemble, *layer.weight.shape))

    def total(weight, x):
        fixed = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        return jnp.sum(jax.vmap(fixed)(x)), jax.vmap(fixed)(x)

    gradient = jax.vmap(jax.grad(total, argnums=(0, 1), has_aux=True), in_axes=(0, None))
    x = jnp.ones((examples, 4, 4, 4))
    (dw, dx), y = jax.jit(gradient)(weights, x)
    assert dw.shape == weights.shape and dx.shape == (ensemble, *x.shape)
    assert y.shape == (ensemble, examples, 6, 4 // stride, 4 // stride)
    assert not dw.any()


@pytest.mark.parametrize("stride", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 1)])
@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_other_platforms_compute_the_same(stride, tasks, x64):
    geometry = _bilinear.Geometry((7, 6), (3, 2), stride, ((1, 0), (2, 1)), (1, 2))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tasks, 2, 7, 6, 3))
    w = jax.random.normal(keys[1], (tasks, 3, 2, 3, 4))
    y = jax.random.normal(keys[2], (tasks, 2, *geometry.out, 4))
    for name, args in (
        ("convolve", (x, w)),
        ("input_gradient", (y, w)),
        ("filter_gradient", (x, y)),
    ):
        cpu, other = (getattr(_bilinear, f"_{name}_{where}") for where in ("cpu", "lax"))
        found, expected = cpu(*args, geometry=geometry), other(*args, geometry=geometry)
        assert tree_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_compiled_outer_step_has_no_convolution_in_it():
    model = eqx.nn.Sequential(
        [
            em.nn.Conv2d(1, 4, 3, padding=1, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            em.nn.MaxPool2d(2, 2),
            em.nn.Conv2d(4, 5, 4, key=jax.random.key(1)),
            eqx.nn.Lambda(jnp.ravel),
        ]
    )
    x, y = jnp.ones((2, 3, 1, 8, 8)), jnp.zeros((2, 3), jnp.int32)
    # Of two steps the first one is differentiated outside of a loop, the second in it.
    inner = em.InnerLoop(optax.sgd(0.1), 2, "mixed")

    def compiled(model):
        maml = em.MAML(em.losses.cross_entropy, inner, optax.sgd(0.1), task_chunk=None)
        arrays, static = eqx.partition(maml.init(model), eqx.is_array)

        def step(arrays):
            new, _ = maml.outer_update(
                eqx.combine(arrays, static), em.Task((x, y), (x, y)), key=None
            )
            return eqx.filter(new, eqx.is_array)

        return jax.jit(step).lower(arrays).compile().as_text()

    program = compiled(model)
    for name in ("convolution", "reduce-window", "select-and-scatter"):
        assert f" {name}(" not in program


def test_operations_are_counted_as_those_of_equinox():
    theirs, ours, x = pair(kernel_size=3, padding=1, use_bias=False)
    forward = 2 * 2 * 7 * 6 * 6 * 4 * 9
    assert count_flops(lambda x: jax.vmap(ours)(x), x) == forward
    assert count_flops(lambda x: jax.vmap(theirs)(x), x) == forward
    # Forwards, in the input and in the weights; sine, cosine, their product and the sum beside.
    grad = count_flops(lambda x: jax.grad(loss, (0, 1))(ours, x), x)
    assert 3 * forward <= grad < 3.1 * forward + 4 * 2 * 6 * 7 * 6


@pytest.mark.slow
def test_half_precision_stays():
    layer = em.nn.Conv2d(4, 6, 3, dtype=jnp.bfloat16, key=jax.random.key(0))
    x = jnp.ones((4, 5, 5), jnp.bfloat16)
    assert layer(x).dtype == eqx.filter_grad(lambda m: jnp.sum(m(x)))(layer).weight.dtype == x.dtype


def test_errors(as_users_run_it):
    layer = em.nn.Conv2d(4, 6, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 5\)[\s\S]*\[4, height, width\]"):
        layer(jnp.ones((2, 4, 5, 5)))
    with pytest.raises(TypeError, match="int32"):
        layer(jnp.ones((4, 5, 5), jnp.int32))
    with pytest.raises(ValueError, match="divisible"):
        em.nn.Conv2d(3, 4, 3, groups=2, key=jax.random.key(0))
    assert np.shape(layer(np.ones((4, 5, 5), np.float32))) == (6, 3, 3)
    # Equinox finds out when the layer is called, if at all.
    for options, said in (
        (dict(stride=-1), r"Conv2d\(stride=...\)` is too small[\s\S]*-1"),
        (dict(stride=(1, 0)), r"Conv2d\(stride=...\)` is too small[\s\S]*\(1, 0\)"),
        (dict(dilation=0), r"Conv2d\(dilation=...\)` is too small"),
        (dict(groups=2), r"Conv2d\(out_channels=...\)`[\s\S]*3 of 2 groups"),
    ):
        with pytest.raises(ValueError, match=said):
            em.nn.Conv2d(4, 3, 3, **options, key=jax.random.key(0))


@pytest.mark.parametrize("layer", ["conv", "pool"])
def test_images_of_numpy_are_taken_as_equinox_takes_them(layer, as_users_run_it):
    """Of float64 JAX makes its own float: `image / 255` is that."""
    image = np.random.default_rng(0).random((1, 8, 8))
    theirs = {"conv": eqx.nn.Conv2d(1, 2, 3, key=jax.random.key(0)), "pool": eqx.nn.MaxPool2d(3, 2)}
    ours = em.nn.fast(theirs[layer])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(image).dtype == jnp.float32
        empty = ours(image[:, :2, :2])
        assert empty.dtype == jnp.float32 and empty.size == 0
    assert tree_allclose(ours(image), theirs[layer](image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(kernel_size=5), dict(kernel_size=3, stride=2), dict(kernel_size=3)]
)
def test_a_kernel_larger_than_the_image_gives_an_empty_one(options):
    theirs, ours, _ = pair(**options)
    x = jnp.ones((4, 2, 2))
    assert ours(x).shape == theirs(x).shape and ours(x).size == 0


def test_without_jit():
    theirs, ours, x = pair(kernel_size=3)
    with jax.disable_jit():
        assert tree_allclose(ours(x[0]), theirs(x[0]), rtol=1e-5, atol=1e-5)


def test_half_precision_adds_up_before_it_rounds():
    theirs, ours = (
        cls(64, 64, 3, use_bias=False, dtype=jnp.float16, key=jax.random.key(0))
        for cls in (eqx.nn.Conv2d, em.nn.Conv2d)
    )
    # Each row of the kernel alone gives more than float16 can hold, all of them together zero.
    weight = jnp.ones((64, 64, 3, 3), jnp.float16).at[:, :, 1].set(-2)
    x = jnp.full((64, 3, 3), 400, jnp.float16)
    for layer in (theirs, ours):
        layer = eqx.tree_at(lambda c: c.weight, layer, weight)
        assert jnp.all(layer(x) == 0)


SHARDED = """
import jax, jax.numpy as jnp, equinox as eqx, eqxmeta as em
from jax.sharding import PartitionSpec as P

jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
layer = em.nn.Conv2d(2, 3, 3, key=jax.random.key(0), dtype=jnp.float64)
x = jax.random.normal(jax.random.key(1), (4, 2, 5, 5), jnp.float64)

def total(layer, x):
    return jnp.sum(jnp.sin(jax.vmap(layer)(x)))

def sharded(layer, x):
    def part(layer, x):
        return jax.lax.psum(total(layer, x), "t")
    return jax.shard_map(part, mesh=mesh, in_specs=(P(), P("t")), out_specs=P())(layer, x)

one, two = jax.grad(total)(layer, x), jax.jit(jax.grad(sharded))(layer, x)
assert jnp.allclose(one.weight, two.weight, rtol=1e-12), (one.weight, two.weight)
assert jnp.allclose(one.bias, two.bias, rtol=1e-12)
"""


@pytest.mark.slow
def test_weights_on_every_device_get_the_whole_gradient():
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", SHARDED], env=flags, check=True, timeout=300)
