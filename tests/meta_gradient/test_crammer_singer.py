"""The machine of Crammer and Singer: that it is at its optimum, and where that is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta._meta_gradient.crammer_singer import crammer_singer

solve = eqx.filter_jit(crammer_singer)


def problems(ways, shots, features, scale=1.0, count=3):
    """Positive features, as after a relu, in clouds that overlap."""
    rng, y = np.random.default_rng(0), np.repeat(np.arange(ways), shots)
    noise = rng.standard_normal((count, len(y), features))
    centres = rng.standard_normal((count, ways, features))[:, y]
    return scale * np.maximum(noise + centres, 0), y


def values(w, alpha, f, member, cost):
    """Of primal and dual, written out; the dual's after it was made feasible to the last bit."""
    w, alpha, f = (np.asarray(x, np.float64) for x in (w, alpha, f))
    scores = f @ w.T
    slack = np.max(scores + 1 - member, axis=1) - np.sum(member * scores, axis=1)
    alpha = np.where(member == 1, 0, np.minimum(alpha, 0))
    alpha = alpha * np.minimum(1, cost / np.maximum(-alpha.sum(1, keepdims=True), 1e-300))
    alpha = alpha - member * alpha.sum(1, keepdims=True)
    dual = np.sum(member * alpha) - np.sum((alpha.T @ f) ** 2) / 2
    return np.sum(w**2) / 2 + cost * np.sum(slack), dual


@pytest.mark.parametrize(
    ("ways", "shots", "features", "scale", "cost"),
    [
        pytest.param(5, 1, 64, 1.0, 0.1, marks=pytest.mark.slow),
        (5, 5, 2, 1.0, 0.1),  # more examples than features, and not separable
        pytest.param(5, 15, 64, 1.0, 0.1, marks=pytest.mark.slow),
        pytest.param(20, 1, 64, 1.0, 0.1, marks=pytest.mark.slow),
        pytest.param(2, 1, 64, 1.0, 1.0, marks=pytest.mark.slow),  # a hard margin
        pytest.param(3, 4, 3, 0.03, 0.01, marks=pytest.mark.slow),  # all inside of the margin
        pytest.param(3, 4, 3, 3.0, 10.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("precision", [1e-8, 1e-4])
def test_primal_is_dual(ways, shots, features, scale, cost, precision):
    """Which bounds the distance from the optimum, whatever the way. Several under `vmap`."""
    with jax.enable_x64(precision == 1e-8):
        f, y = problems(ways, shots, features, scale)
        member = np.eye(ways)[y]
        f = jnp.asarray(f, float)
        given = jnp.asarray(member, float), jnp.ones(ways, bool), jnp.ones(len(y)), cost
        w, alpha = jax.jit(jax.vmap(lambda f: crammer_singer(f, *given)))(f)
        assert w.dtype == (np.float64 if precision == 1e-8 else np.float32)
        for one in zip(w, alpha, f, strict=True):
            primal, dual = values(*one, member, cost)
            assert abs(primal - dual) < precision * primal


def test_where_the_optimum_is_known(x64):
    """Of two examples, of which each is a class. Of a large cost, each is on its margin: `w_0·x_0 =
    1/2 = -w_0·x_1`. Of a small one, both are at their bounds."""
    f = jnp.array([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]])
    w, _ = solve(f, jnp.eye(2), jnp.ones(2, bool), jnp.ones(2), 1e3)
    multipliers = np.linalg.solve(np.asarray(f @ f.T), [0.5, -0.5])
    np.testing.assert_allclose(w[0], multipliers @ np.asarray(f), rtol=1e-8)
    np.testing.assert_allclose(w[1], -w[0], rtol=1e-8)
    w, alpha = solve(f, jnp.eye(2), jnp.ones(2, bool), jnp.ones(2), 1e-3)
    np.testing.assert_allclose(w[0], 1e-3 * np.asarray(f[0] - f[1]), rtol=1e-8)
    np.testing.assert_allclose(alpha, 1e-3 * np.array([[1, -1], [-1, 1]]), rtol=1e-8)


def test_the_derivative_against_finite_differences(x64):
    """Of points with support vectors inside, at and beyond the margin."""
    f, y = problems(3, 4, 6, count=1)
    f, member = jnp.asarray(f[0]), jnp.eye(3)[y]
    present, weight = jnp.ones(3, bool), jnp.ones(12)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal((3, 12, 6)))
    probe = jnp.asarray(np.random.default_rng(2).standard_normal((3, 6)))

    def fun(f):
        w, alpha = crammer_singer(f, member, present, weight, 0.1)
        return jnp.sum(probe * w**2), jnp.sum(member * alpha, axis=1) / 0.1

    both = jax.jit(jax.value_and_grad(fun, has_aux=True))
    (_, share), gradient = both(f)
    assert share.min() < 0.9 and share.max() > 0.999
    for d in direction:
        estimate = (both(f + 1e-5 * d)[0][0] - both(f - 1e-5 * d)[0][0]) / 2e-5
        np.testing.assert_allclose(jnp.sum(gradient * d), estimate, rtol=1e-6)


def test_weights_repeat_and_remove_examples(x64):
    """Weight 2 is the example twice, weight 0 is none, and so is a class that is not there."""
    f, y = problems(3, 3, 5, count=1)
    f, member = jnp.asarray(f[0]), jnp.eye(3)[y]
    weight = jnp.array([1.0, 2, 0, 1, 1, 1, 0, 1, 2])
    rows = np.repeat(np.arange(9), np.asarray(weight, int))
    w, alpha = solve(f, member, jnp.ones(3, bool), weight, 0.1)
    expected, _ = solve(f[rows], member[rows], jnp.ones(3, bool), jnp.ones(9), 0.1)
    np.testing.assert_allclose(w, expected, atol=1e-8)
    np.testing.assert_array_equal(alpha[np.array([2, 6])], 0)
    more = jnp.pad(member, ((0, 0), (0, 2)))
    w, _ = solve(f[rows], more[rows], jnp.arange(5) < 3, jnp.ones(9), 0.1)
    np.testing.assert_allclose(w[:3], expected, atol=1e-8)
    np.testing.assert_array_equal(w[3:], 0)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_what_has_nothing_to_decide(labels):
    """One class alone; and features that are zero, which say nothing."""
    member = jnp.eye(2)[np.array(labels)]
    f = jnp.ones((2, 3)) * (labels == [0, 0])

    def total(f):
        present = jnp.array([True, 1 in labels])
        return jnp.sum(crammer_singer(f, member, present, jnp.ones(2), 0.1)[0])

    value, gradient = jax.jit(jax.value_and_grad(total))(f)
    assert value == 0 and jnp.isfinite(gradient).all()
