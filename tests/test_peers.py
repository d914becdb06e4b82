"""The benchmark's peers compute what we compute; and the plain-JAX one, what NumPy says."""

import functools
import importlib
import sys
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from benchmarks import peers
from benchmarks._workload import (
    INNER_RATE,
    LAYERS,
    OUTER_RATE,
    POINTS,
    initial_weights,
    relative_error,
    sample,
)

STEPS = 10  # after fewer, an Adam with another b2 would pass
TORCH = {"torch_func": "torch", "torch_loop": "torch", "higher": "higher", "torchopt": "torchopt"}


@pytest.fixture(autouse=True)
def plain_jax():
    """A peer is written as its users write it: `x @ w.T + b`."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def one_thread():
    """Threads of torch that wait for each other while other tests run make it many times slower."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peer(name):
    return importlib.import_module(f"benchmarks.peers._{name}").Peer(initial_weights(0))


@functools.cache
def ours(mode):
    """Of `em.MAML`: the meta-gradient on the first tasks, and the loss of the last outer step."""
    # The trace without decay is the gradient itself, and hands it on.
    optimizer = optax.chain(optax.trace(decay=0.0), optax.adam(OUTER_RATE))
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(INNER_RATE), 1, mode), optimizer)
    model = eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0))
    model = eqx.tree_at(
        lambda m: [x for layer in m.layers for x in (layer.weight, layer.bias)],
        model,
        [jnp.asarray(x) for layer in initial_weights(0) for x in layer],
    )
    state, rng, gradients = strategy.init(model), np.random.default_rng(0), []
    for _ in range(STEPS):
        support_x, support_y, query_x, query_y = map(jnp.asarray, sample(rng))
        tasks = em.Task(support=(support_x, support_y), query=(query_x, query_y))
        state, metrics = strategy.outer_update(state, tasks, key=None)
        gradients.append([np.asarray(g) for g in jax.tree.leaves(state.opt_state[0])])
    return gradients[0], float(metrics["loss"])


def check(name, mode):
    other = peer(name)
    other.train(STEPS)
    # After training: still that of the initial weights.
    gradient = other.meta_gradient(sample(np.random.default_rng(0)))
    our_gradient, our_loss = ours(mode)
    assert relative_error(gradient, our_gradient) < 1e-5
    assert other.loss == pytest.approx(our_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_plain_jax_agrees_with_ours(mode):
    check("notebook", mode)


@pytest.mark.parametrize("name", TORCH)
def test_torch_agrees_with_ours(name, one_thread):
    pytest.importorskip(TORCH[name])
    for mode in ("mixed", "reverse"):
        check(name, mode)


def numpy_meta_loss(weights, tasks):
    """The workload once more, with backpropagation by hand."""

    def forward(weights, x):
        inputs = []
        for weight, bias in weights:
            inputs.append(x)
            before = x @ weight.T + bias
            x = np.maximum(before, 0)
        return before, inputs

    def adapt(weights, x, y):
        prediction, inputs = forward(weights, x)
        error, adapted = 2 * (prediction - y) / y.size, []
        for (weight, bias), x in zip(reversed(weights), reversed(inputs), strict=True):
            adapted.append(
                (weight - INNER_RATE * error.T @ x, bias - INNER_RATE * error.sum(axis=0))
            )
            error = (error @ weight) * (x > 0)
        return adapted[::-1]

    return np.mean(
        [
            np.mean((forward(adapt(weights, support_x, support_y), query_x)[0] - query_y) ** 2)
            for support_x, support_y, query_x, query_y in zip(*tasks, strict=True)
        ]
    )


def test_plain_jax_agrees_with_finite_differences_in_float64(x64):
    weights = [(w.astype(float), b.astype(float)) for w, b in initial_weights(0)]
    tasks = tuple(x.astype(float) for x in sample(np.random.default_rng(1)))
    gradient = importlib.import_module("benchmarks.peers._notebook").Peer(weights)
    gradient = gradient.meta_gradient(tasks)
    assert all(g.dtype == np.float64 for g in gradient)
    leaves, structure = jax.tree.flatten(weights)

    def value(direction, h):
        moved = [x + h * d for x, d in zip(leaves, direction, strict=True)]
        return numpy_meta_loss(jax.tree.unflatten(structure, moved), tasks)

    # Small, so that no unit switches on or off on the way: there the objective jumps.
    rng, h = np.random.default_rng(0), 1e-7
    for _ in range(3):
        direction = [rng.standard_normal(x.shape) for x in leaves]
        slope = (value(direction, h) - value(direction, -h)) / (2 * h)
        along = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
        assert along == pytest.approx(slope, rel=1e-6)


def test_the_workload_is_the_notebooks():
    tasks = sample(np.random.default_rng(0), 4000)
    assert all(x.shape == (4000, POINTS, 1) and x.dtype == np.float32 for x in tasks)
    # E[A^2] / 2 for A in U(0.1, 5): what predicting zero costs.
    assert np.mean(np.concatenate(tasks[1::2]) ** 2) == pytest.approx(4.25, abs=0.3)
    for (weight, bias), (i, o) in zip(initial_weights(0), pairwise(LAYERS), strict=True):
        assert weight.shape == (o, i) and bias.shape == (o,)
        assert weight.dtype == bias.dtype == np.float32
        assert np.abs(weight).max() <= i**-0.5 and np.abs(bias).max() <= i**-0.5


def test_relative_error_is_over_all_leaves_and_refuses_other_shapes():
    a, b = [np.array([3.0, 0.0]), np.array([[0.0]])], [np.array([0.0, 0.0]), np.array([[4.0]])]
    assert relative_error(a, b) == pytest.approx(5 / 4)
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(a, [np.zeros(2), np.zeros(1)])


def test_a_peer_that_is_not_installed_is_reported_with_its_extra(monkeypatch):
    for library in set(TORCH.values()):
        monkeypatch.setitem(sys.modules, library, None)
    for name in TORCH:
        monkeypatch.delitem(sys.modules, f"benchmarks.peers._{name}", raising=False)
    found, missing = peers.available()
    assert list(found) == ["notebook"]
    assert {name: extra for name, (_, extra) in missing.items()} == {
        "torch_func": "bench-torch",
        "torch_loop": "bench-torch",
        "higher": "bench-higher",
        "torchopt": "bench-torchopt",
    }
    assert "higher" in missing["higher"][0]
