"""Evolution strategies against exact gradients, and against formulas of the smoothed ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def maml(estimator, **options):
    inner = em.InnerLoop(optax.sgd(0.1), 1)
    return em.MAML(MSE, inner, optax.sgd(1.0), estimator=estimator, **options)


def sine_tasks(num_tasks=4) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, num_tasks))


def gradient(strategy, tasks, key=KEY):
    """Plain descent at rate 1 shows the gradient."""
    state = strategy.init(tiny_mlp())
    new, metrics = strategy.outer_update(state, tasks, key=key)
    step = jax.tree.map(lambda old, new: old - new, state.model, new.model)
    return np.asarray(jax.flatten_util.ravel_pytree(step)[0]), metrics


def test_the_direction_is_that_of_the_exact_meta_gradient(x64):
    tasks = sine_tasks()
    exact, expected = gradient(maml(em.ReverseMode()), tasks)
    ours, metrics = gradient(maml(em.EvolutionStrategies(1e-3, 4_000)), tasks)
    assert exact.size == 25
    assert ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact) > 0.99
    # Of 4,000 draws the error is sqrt(26 / 4000), 0.08 of the gradient.
    assert np.linalg.norm(ours - exact) < 0.12 * np.linalg.norm(exact)
    assert tree_allclose(
        {k: v for k, v in metrics.items() if k != "grad_norm"},
        {k: v for k, v in expected.items() if k != "grad_norm"},
        rtol=1e-12,
    )


def test_a_quadratic_has_a_known_smoothed_gradient(x64):
    """Smoothing `x A x / 2 + b x` adds a constant: its gradient is `A x + b` at any sigma."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 3))
    a, b, x = a + a.T, rng.normal(size=3), rng.normal(size=3)

    def objective(x):
        return 0.5 * x @ a @ x + b @ x, {"at": x[0]}

    for sigma in (0.01, 3.0):
        estimator = em.EvolutionStrategies(sigma, 20_000)
        (value, metrics), grads = jax.jit(
            lambda x, e=estimator: e(objective, x, key=KEY)
        )(jnp.asarray(x))  # fmt: skip
        np.testing.assert_allclose(value, objective(x)[0], rtol=1e-12)
        assert metrics["at"] == x[0]
        np.testing.assert_allclose(grads, a @ x + b, atol=0.06 * np.linalg.norm(a @ x + b))


def test_what_is_estimated_is_the_smoothed_gradient(x64):
    """Of a step, whose gradient is zero: the density of the Gaussian at the distance to it. Of a
    cosine, `-sin(x) exp(-σ²/2)`."""
    x, sigma = jnp.float64(0.4), 0.8
    estimator = em.EvolutionStrategies(sigma, 40_000)
    _, jump = estimator(lambda x: (jnp.where(x > 1.0, 1.0, 0.0), {}), x, key=KEY)
    density = np.exp(-0.5 * (0.6 / sigma) ** 2) / sigma / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(jump, density, rtol=0.03)
    _, wave = estimator(lambda x: (jnp.cos(x), {}), x, key=KEY)
    np.testing.assert_allclose(wave, -np.sin(0.4) * np.exp(-(sigma**2) / 2), rtol=0.03)


def test_complex_and_half_precision_parameters():
    """The direction of growth, real and imaginary: of `|z - c|²` it is `2 (z - c)`."""
    params = {"z": jnp.array([1.0 + 2.0j]), "h": jnp.ones(2, jnp.bfloat16)}

    def objective(p):
        half = jnp.sum(p["h"].astype(jnp.float32) * jnp.array([1.0, -2.0]))
        return jnp.sum(jnp.abs(p["z"] - (3.0 - 1.0j)) ** 2) + half, {}

    _, grads = em.EvolutionStrategies(0.5, 20_000)(objective, params, key=KEY)
    assert {name: x.dtype for name, x in grads.items()} == {"z": "complex64", "h": "bfloat16"}
    np.testing.assert_allclose(grads["z"], [2 * (-2.0 + 3.0j)], atol=0.3)
    np.testing.assert_allclose(grads["h"].astype(np.float32), [1.0, -2.0], atol=0.3)


@pytest.mark.parametrize("task_chunk", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_chunks_of_tasks_see_the_same_perturbations(task_chunk, x64):
    estimator, tasks = em.EvolutionStrategies(0.05, 3), sine_tasks()
    whole, metrics = gradient(maml(estimator, task_chunk=None), tasks)
    parts, of_parts = gradient(maml(estimator, task_chunk=task_chunk), tasks)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)
    assert tree_allclose(of_parts, metrics, rtol=1e-9)


def test_no_key_is_used_twice():
    """By JAX's own checker, which takes every loop in mixed mode for a reuse."""
    inner = em.InnerLoop(optax.sgd(0.1), 2, "first_order")
    strategy = em.MAML(MSE, inner, optax.sgd(1.0), estimator=em.EvolutionStrategies(0.05, 2))
    state, tasks = strategy.init(tiny_mlp()), sine_tasks(2)
    with jax.debug_key_reuse(True):
        jax.jit(lambda s, t, k: strategy.outer_update(s, t, key=k))(state, tasks, jax.random.key(3))


def test_the_draws_are_not_those_of_the_tasks_keys():
    """`fold_in(key, i)` is the i-th of `split(key)`: the parameters must not be moved by what a
    task draws from its own key."""
    seen = []

    def objective(x):
        jax.debug.callback(lambda x: seen.append(abs(float(x[0]))), x)
        return jnp.sum(x), {}

    em.EvolutionStrategies(1.0, 64)(objective, jnp.zeros(1), key=KEY)
    jax.effects_barrier()
    keys = jax.random.split(KEY, 64)
    keys = jnp.concatenate([keys, *map(jax.random.split, keys[:2])])
    drawn = np.abs(jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)).ravel()
    assert len(set(seen)) == 65 and not set(seen) & set(drawn.tolist())


def test_memory_does_not_grow_with_pairs():
    def temporary(pairs):
        strategy, tasks = maml(em.EvolutionStrategies(0.05, pairs)), sine_tasks()
        state = strategy.init(tiny_mlp())
        step = jax.jit(lambda s, t, k: strategy.outer_update(s, t, key=k))
        return step.lower(state, tasks, KEY).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1_000) <= temporary(2) + 8 * 1_024


def test_without_a_key_it_is_refused():
    with pytest.raises(ValueError, match="`EvolutionStrategies` draws" + THREE_PARTS):
        gradient(maml(em.EvolutionStrategies(0.1, 1)), sine_tasks(), key=None)


@pytest.mark.parametrize(
    "name",
    ["MAML", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Joint", "MetaSGD", "ProtoNet"))],
)
def test_any_strategy_learns_by_it(name):
    arguments = (MSE, em.InnerLoop(optax.sgd(0.1), 1), optax.adam(0.03))
    estimator = em.EvolutionStrategies(0.02, 8)
    if name == "ProtoNet":
        x = jax.random.normal(KEY, (2, 12, 4))
        y = (x[..., 0] > 0).astype(jnp.int32)
        tasks = em.Task((x[:, :6], y[:, :6]), (x[:, 6:], y[:, 6:]))
        strategy = em.ProtoNet(em.losses.cross_entropy, optax.adam(0.03), estimator=estimator)
        model = eqx.nn.Linear(4, 2, key=KEY)
    else:
        strategy, tasks = getattr(em, name)(*arguments, estimator=estimator), sine_tasks()
        model = tiny_mlp()
    update = eqx.filter_jit(lambda s, k: strategy.outer_update(s, tasks, key=k))
    state, losses = strategy.init(model), []
    for i in range(40):
        state, metrics = update(state, jax.random.key(i))
        losses.append(float(metrics["objective" if "objective" in metrics else "loss"]))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": "0.1"}, "sigma"),
        ({"sigma": True}, "sigma"),
        ({"pairs": 0}, "pairs"),
        ({"pairs": 2.0}, "pairs"),
    ],
)
def test_wrong_arguments_are_named(arguments, argument):
    with pytest.raises((TypeError, ValueError), match=rf"\({argument}=...\)`" + THREE_PARTS):
        em.EvolutionStrategies(**({"sigma": 0.1, "pairs": 1} | arguments))
