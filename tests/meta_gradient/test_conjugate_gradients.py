"""Conjugate gradients against a dense solve, and where they end before."""

import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta._meta_gradient.conjugate_gradients import conjugate_gradients


def solve(matrix, b, steps, **options):
    x, bent = conjugate_gradients(
        lambda p: jnp.asarray(matrix) @ p, jnp.asarray(b), steps, **options
    )
    return np.asarray(x), bool(bent)


def test_a_positive_definite_system_is_solved(x64):
    a, b = np.random.default_rng(0).standard_normal((6, 6)), np.arange(6.0) + 1
    matrix = a @ a.T + np.eye(6)
    x, bent = solve(matrix, b, 6, least=0.1)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-9)
    assert not bent
    few, _ = solve(matrix, b, 1)
    np.testing.assert_allclose(few, b * (b @ b) / (b @ matrix @ b), rtol=1e-12)


@pytest.mark.parametrize(("least", "smallest"), [(0.0, -0.2), (0.1, 0.05)])
def test_it_ends_at_the_first_direction_that_curves_too_little(x64, least, smallest):
    matrix = np.diag([2.0, 1.0, smallest])
    # The first direction is b, with much of the large eigenvalues; by the third the last is alone.
    b = np.array([1.0, 1.0, 0.5])
    x, bent = solve(matrix, b, 50, least=least)
    assert bent and x @ b > 0
    rows = [solve(matrix, b, steps, least=-10.0)[0] for steps in (1, 2)]
    assert any(np.allclose(x, row, rtol=1e-12) for row in rows)  # what was found before
    assert not np.allclose(x, np.linalg.solve(matrix, b), rtol=0.1)


def test_if_it_is_the_first_one_b_is_left(x64):
    b = np.array([0.1, 1.0])
    x, bent = solve(np.diag([1.0, -1.0]), b, 5)
    assert bent
    np.testing.assert_array_equal(x, b)


def test_zero_has_the_solution_zero():
    x, bent = solve(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), 3)
    assert not bent
    np.testing.assert_array_equal(x, 0)
