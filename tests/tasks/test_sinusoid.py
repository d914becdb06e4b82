import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta.tasks import Sinusoid

from ..helpers import tree_allclose

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def points(source, num_tasks, seed=0):
    """Support and query points of many tasks, `[num_tasks, shots + queries]` each."""
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    tasks = jax.jit(jax.vmap(source.sample))(keys)
    x, y = (np.concatenate(pair, axis=1) for pair in zip(tasks.support, tasks.query, strict=True))
    return x[..., 0].astype(np.float64), y[..., 0].astype(np.float64)


def fitted_waves(x, y):
    """Amplitude, phase and residual of each task, from its points alone."""
    amplitude, phase, residual = [], [], []
    for task_x, task_y in zip(x, y, strict=True):
        # A sin(x - p) = (A cos p) sin x - (A sin p) cos x
        basis = np.stack([np.sin(task_x), -np.cos(task_x)], axis=1)
        weights = np.linalg.lstsq(basis, task_y, rcond=None)[0]
        amplitude.append(np.hypot(*weights))
        phase.append(np.arctan2(weights[1], weights[0]))
        residual.append(np.abs(basis @ weights - task_y).max())
    return np.array(amplitude), np.array(phase), np.array(residual)


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov, at a level of one in a thousand."""
    values = np.sort((np.ravel(values) - low) / (high - low))
    gap = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert gap < 1.95 / math.sqrt(len(values))


def task_blind_error(x, y, bins=50):
    """Mean squared error of the best function of x alone, as a histogram."""
    which = np.digitize(x.ravel(), np.linspace(-5, 5, bins + 1)[1:-1])
    mean = np.bincount(which, y.ravel()) / np.bincount(which)
    return np.mean((y.ravel() - mean[which]) ** 2)


def test_shapes_and_dtypes():
    task = Sinusoid(shots=5, queries=7).sample(jax.random.key(0))
    for (x, y), n in ((task.support, 5), (task.query, 7)):
        assert x.shape == y.shape == (n, 1)
        assert x.dtype == y.dtype == jnp.float32


def test_default_float_dtype_is_followed(x64):
    task = Sinusoid(shots=5, queries=7).sample(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(task)} == {jnp.dtype("float64")}


def test_each_task_is_one_sine_wave_of_uniform_amplitude_and_phase():
    amplitude, phase, residual = fitted_waves(*points(Sinusoid(10, 10), 3000))
    assert residual.max() < 1e-4
    assert_uniform(amplitude, 0.1, 5.0)
    assert_uniform(phase, -math.pi, math.pi)


def test_ranges_are_followed():
    source = Sinusoid(10, 10, amplitude=(1, 2), phase=(0.5, 1.0), x_range=(2, 9))
    x, y = points(source, 1000)
    amplitude, phase, residual = fitted_waves(x, y)
    assert residual.max() < 1e-4
    assert_uniform(amplitude, 1, 2)
    assert_uniform(phase, 0.5, 1.0)
    assert_uniform(x, 2, 9)


def test_equal_ends_fix_the_value():
    x, y = points(Sinusoid(3, 3, amplitude=(2, 2), phase=(0, 0)), 5)
    np.testing.assert_allclose(y, 2 * np.sin(x), atol=1e-5)


def test_references_with_the_phase_of_the_paper():
    x, y = points(Sinusoid(5, 5, phase=(0, math.pi)), 40_000)
    assert np.mean(y**2) == pytest.approx(4.25, abs=0.06)
    assert task_blind_error(x, y) == pytest.approx(3.01, abs=0.06)


def test_with_every_phase_nothing_is_known_before_the_task():
    x, y = points(Sinusoid(5, 5), 40_000)
    assert np.mean(y**2) == pytest.approx(4.25, abs=0.06)
    assert task_blind_error(x, y) == pytest.approx(np.mean(y**2), abs=0.02)


def test_the_same_key_gives_the_same_task_inside_and_outside_of_loops():
    source = Sinusoid(4, 3)
    keys = jax.random.split(jax.random.key(1), 3)
    singly = [source.sample(key) for key in keys]

    def body(i, x):
        return x.at[i].set(source.sample(keys[i]).query[0])

    looped = jax.jit(lambda: jax.lax.fori_loop(0, 3, body, jnp.zeros((3, 3, 1))))()
    assert tree_allclose(looped, jnp.stack([task.query[0] for task in singly]))
    batched = jax.vmap(source.sample)(keys)
    assert tree_allclose(batched, jax.tree.map(lambda *x: jnp.stack(x), *singly))
    assert not np.allclose(singly[0].support[0], singly[1].support[0])


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"shots": 0}, ValueError),
        ({"queries": -1}, ValueError),
        ({"shots": True}, TypeError),
        ({"amplitude": (5.0, 0.1)}, ValueError),
        ({"phase": (0.0, math.inf)}, ValueError),
        ({"x_range": (math.nan, 1.0)}, ValueError),
    ],
)
def test_wrong_arguments_are_named(changed, error):
    (name,) = changed
    with pytest.raises(error, match=rf"`{name}`(?s:.*)Received: (?s:.*)Expected: "):
        Sinusoid(**({"shots": 5, "queries": 5} | changed))
