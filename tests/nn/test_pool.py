"""`em.nn.MaxPool2d` against `eqx.nn.MaxPool2d`, with many equal values in a window."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em

from ..helpers import tree_allclose

OPTIONS = {
    "halves": dict(kernel_size=2, stride=2),
    "overlapping": dict(kernel_size=3, stride=2, padding=1),
    "gaps": dict(kernel_size=2, stride=3, padding=1),
    "ceil": dict(kernel_size=(3, 2), stride=(3, 1), use_ceil=True),
    "uneven": dict(kernel_size=2, stride=2, padding=((1, 0), (0, 1))),
}


def derivatives(layer, x):
    weights = jnp.cos(jnp.arange(jax.vmap(layer)(x).size, dtype=x.dtype))
    along = jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def fun(x):
        return jnp.sum(weights * jnp.sin(jax.vmap(layer)(x)).ravel())

    grad, forward = jax.jvp(jax.grad(fun), (x,), (along,))
    reverse = jax.grad(lambda x: jnp.vdot(jax.grad(fun)(x), along))(x)
    return jax.vmap(layer)(x), grad, forward, reverse


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_derivatives_are_those_of_equinox(name, x64):
    theirs, ours = (cls(**OPTIONS[name]) for cls in (eqx.nn.MaxPool2d, em.nn.MaxPool2d))
    # Few different values, after a ReLU: most windows have several maxima.
    x = jax.nn.relu(jnp.round(jax.random.normal(jax.random.key(0), (2, 3, 7, 6))))
    expected = jax.jit(lambda x: derivatives(theirs, x))(x)
    found = jax.jit(lambda x: derivatives(ours, x))(x)
    assert tree_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_of_equal_maxima_gets_the_whole_gradient(stride):
    grad = jax.grad(lambda x: jnp.sum(em.nn.MaxPool2d(2, stride)(x)))(jnp.zeros((1, 2, 2)))
    assert np.array_equal(grad, [[[1, 0], [0, 0]]])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_nan_is_not_lost(stride):
    for place in range(4):
        x = jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2)
        assert np.isnan(em.nn.MaxPool2d(2, stride)(x)).all()


def test_errors(as_users_run_it):
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 2\)"):
        em.nn.MaxPool2d(2)(jnp.zeros((1, 1, 2, 2)))
    with pytest.raises(RuntimeError, match="padding"):
        em.nn.MaxPool2d(2, padding=3)(jnp.zeros((1, 5, 5)))
    with pytest.raises(ValueError, match="kernel_size"):
        em.nn.MaxPool2d(2.5)
    for stride in (0, (1, -1)):
        with pytest.raises(ValueError, match=r"MaxPool2d\(stride=...\)` is too small"):
            em.nn.MaxPool2d(2, stride)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, stride, size", [(12, 12, 12), (2, 20, 22)])
def test_many_places_in_a_stride(kernel, stride, size):
    x = jax.random.normal(jax.random.key(0), (1, size, size))

    def slope(layer):
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(kernel, stride)(x))))(x)

    assert jnp.array_equal(slope(em.nn.MaxPool2d), slope(eqx.nn.MaxPool2d))
