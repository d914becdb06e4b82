"""The update rules of the four algorithms, written out by hand, against the strategies.

The reference is plain JAX: a dict of weights, Python loops over tasks and inner steps, optimizers
as formulas. It shares nothing with the library but `jax.grad`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em

UPDATES = 50
WIDTH = 12


# The reference. The formulas are for NumPy and JAX arrays alike: NumPy runs them, but for MAML,
# whose meta-gradient JAX takes through them.


def forward(w: dict[str, Array], x: Array) -> Array:
    hidden = jnp.tanh(x @ w["w0"].T + w["b0"][None, :])
    hidden = jnp.tanh(hidden @ w["w1"].T + w["b1"][None, :])
    return hidden @ w["w2"].T + w["b2"][None, :]


def squared_error(w, examples):
    x, y = examples
    return jnp.sum((forward(w, x) - y) ** 2) / y.size


_gradient = jax.jit(jax.grad(squared_error))


def gradient(w, examples):
    return each(np.asarray, _gradient(w, examples))


def each(fun, *dicts):
    return {name: fun(*(d[name] for d in dicts)) for name in dicts[0]}


def mean(dicts):
    return each(lambda *xs: sum(xs) / len(xs), *dicts)


class Formula(NamedTuple):
    """An optimizer: `start(w) -> state` and `move(w, gradient, state) -> (w, state)`."""

    start: Callable[..., Any]
    move: Callable[..., Any]


def sgd(rate, momentum=0.0):
    """v <- momentum v + g;  w <- w - rate v. `rate` may depend on the number of steps so far."""

    def move(w, g, state):
        v, t = state
        v = each(lambda v, g: momentum * v + g, v, g)
        now = rate(t) if callable(rate) else rate
        return each(lambda w, v: w - now * v, w, v), (v, t + 1)

    return Formula(lambda w: (each(lambda x: 0 * x, w), 0), move)


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma and Ba 2015, algorithm 1."""

    def move(w, g, state):
        m, v, t = state
        t = t + 1
        m = each(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = each(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)

        def one(w, m, v):
            return w - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)

        return each(one, w, m, v), (m, v, t)

    return Formula(lambda w: (each(lambda x: 0 * x, w), each(lambda x: 0 * x, w), 0), move)


def descend(w, examples, inner, steps, state=None, gradient=gradient):
    state = inner.start(w) if state is None else state
    for _ in range(steps):
        w, state = inner.move(w, gradient(w, examples), state)
    return w, state


def split(tasks):
    """A batch of tasks as a list of `((x, y) support, (x, y) query)`."""
    (sx, sy), (qx, qy) = tasks
    return [((sx[i], sy[i]), (qx[i], qy[i])) for i in range(len(sx))]


def together(task):
    (sx, sy), (qx, qy) = task
    return np.concatenate([sx, qx]), np.concatenate([sy, qy])


class MAML:
    def __init__(self, inner, steps, outer):
        def after(w, support, query):
            adapted, _ = descend(w, support, inner, steps, gradient=jax.grad(squared_error))
            return squared_error(adapted, query)

        self.meta_gradient = jax.jit(jax.grad(after))
        self.outer = outer
        self.start = outer.start

    def update(self, w, state, tasks):
        gradients = [each(np.asarray, self.meta_gradient(w, s, q)) for s, q in split(tasks)]
        return self.outer.move(w, mean(gradients), state)


class FOMAML:
    def __init__(self, inner, steps, outer):
        self.inner, self.steps, self.outer = inner, steps, outer
        self.start = outer.start

    def update(self, w, state, tasks):
        gradients = []
        for support, query in split(tasks):
            adapted, _ = descend(w, support, self.inner, self.steps)
            gradients.append(gradient(adapted, query))
        return self.outer.move(w, mean(gradients), state)


class Joint:
    """Knows of no inner loop: gradient descent on everything."""

    def __init__(self, inner, steps, outer):
        self.outer = outer
        self.start = outer.start

    def update(self, w, state, tasks):
        gradients = [gradient(w, together(task)) for task in split(tasks)]
        return self.outer.move(w, mean(gradients), state)


class Reptile:
    """Its state: the number of updates so far, and the inner optimizer's state, if carried."""

    def __init__(self, inner, steps, epsilon, *, carry=False):
        self.inner, self.steps, self.epsilon, self.carry = inner, steps, epsilon, carry

    def start(self, w):
        return 0, self.inner.start(w)

    def update(self, w, state, tasks):
        t, inner_state = state
        ends = [
            descend(w, together(task), self.inner, self.steps, inner_state if self.carry else None)
            for task in split(tasks)
        ]
        phi = mean([w for w, _ in ends])
        w = each(lambda theta, phi: theta + self.epsilon(t) * (phi - theta), w, phi)
        # Of moments the mean; counts are the same in all.
        *moments, counts = zip(*(state for _, state in ends), strict=True)
        return w, (t + 1, (*(mean(m) for m in moments), counts[0]))


# The library's side.


class Net(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers[:-1]:
            x = jax.nn.tanh(layer(x))
        return self.layers[-1](x)


def as_model(w: dict[str, Array]) -> Net:
    layers = []
    for i in range(3):
        layer = eqx.nn.Linear(*w[f"w{i}"].shape[::-1], key=jax.random.key(0))
        weights = jnp.asarray(w[f"w{i}"]), jnp.asarray(w[f"b{i}"])
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, weights)
        layers.append(layer)
    return Net(layers)


def as_dict(model: Net) -> dict[str, Array]:
    return {
        name: getattr(layer, field)
        for i, layer in enumerate(model.layers)
        for name, field in ((f"w{i}", "weight"), (f"b{i}", "bias"))
    }


def as_task(tasks) -> em.Task:
    return em.Task(*jax.tree.map(jnp.asarray, tasks))


def start_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(WIDTH, 1), (WIDTH, WIDTH), (1, WIDTH)]
    w = {}
    for i, shape in enumerate(shapes):
        w[f"w{i}"] = rng.normal(size=shape) / np.sqrt(shape[1])
        w[f"b{i}"] = 0.1 * rng.normal(size=shape[0])
    return each(lambda x: x.astype(default_float()), w)


def default_float() -> np.dtype:
    return jnp.zeros(()).dtype


def sines(num_tasks: int, shots: int, queries: int, seed: int):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, (num_tasks, shots + queries, 1))
    amplitude = rng.uniform(0.5, 2.0, (num_tasks, 1, 1))
    phase = rng.uniform(0, 3, (num_tasks, 1, 1))
    y = (amplitude * np.sin(x - phase)).astype(default_float())
    x = x.astype(default_float())
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def relative(ours: dict[str, Array], reference: dict[str, Array]) -> float:
    """The largest error of a weight array, relative to its norm."""
    return max(
        float(np.linalg.norm(np.asarray(ours[n]) - np.asarray(reference[n])))
        / float(np.linalg.norm(np.asarray(reference[n])))
        for n in reference
    )


def agree(strategy, reference, num_tasks, *, tolerance):
    """Run both for `UPDATES` updates, from the same weights, on the same tasks."""
    w = first = start_weights()
    state, reference_state = strategy.init(as_model(w)), reference.start(w)
    for i in range(UPDATES):
        # Support and query of different sizes, so that mixing them up would show.
        tasks = sines(num_tasks, 5, 7, seed=i)
        state, _ = strategy.outer_update(state, as_task(tasks), key=jax.random.key(i))
        w, reference_state = reference.update(w, reference_state, tasks)
    assert int(state.step) == UPDATES
    assert {x.dtype for x in w.values()} == {default_float()}
    assert relative(as_dict(state.model), w) < tolerance
    # Something has been learnt: the agreement is not that of two idle programs.
    assert relative(w, first) > 0.03
    return state


MSE = em.losses.mse
INNER = {
    "sgd": (optax.sgd(0.05), sgd(0.05)),
    "momentum": (optax.sgd(0.02, momentum=0.9), sgd(0.02, momentum=0.9)),
    "adam": (optax.adam(0.02), adam(0.02)),
    "annealed": (
        optax.sgd(optax.linear_schedule(0.1, 0.0, 4)),
        sgd(lambda t: 0.1 * (1 - t / 4)),
    ),
    "paper": (optax.adam(0.01, b1=0.0), adam(0.01, b1=0.0)),
}
OUTER = {
    "sgd": (optax.sgd(0.03), sgd(0.03)),
    "momentum": (optax.sgd(0.01, momentum=0.8), sgd(0.01, momentum=0.8)),
    "adam": (optax.adam(3e-3), adam(3e-3)),
}
BY_GRADIENT = {"MAML": (em.MAML, MAML), "FOMAML": (em.FOMAML, FOMAML), "Joint": (em.Joint, Joint)}


@pytest.mark.parametrize(
    ("name", "inner", "steps", "outer", "num_tasks", "gradient"),
    [
        pytest.param("MAML", "sgd", 1, "adam", 4, "mixed", marks=pytest.mark.slow),
        ("MAML", "momentum", 5, "sgd", 1, "reverse"),
        ("MAML", "annealed", 3, "momentum", 2, "mixed"),
        pytest.param("FOMAML", "sgd", 1, "sgd", 1, "mixed", marks=pytest.mark.slow),
        pytest.param("FOMAML", "sgd", 5, "adam", 4, "reverse", marks=pytest.mark.slow),
        ("FOMAML", "adam", 3, "momentum", 2, "mixed"),
        ("Joint", "adam", 2, "adam", 4, "mixed"),
    ],
)
def test_meta_gradient_descent(name, inner, steps, outer, num_tasks, gradient):
    strategy, rule = BY_GRADIENT[name]
    ours = strategy(MSE, em.InnerLoop(INNER[inner][0], steps, gradient), OUTER[outer][0])
    agree(ours, rule(INNER[inner][1], steps, OUTER[outer][1]), num_tasks, tolerance=1e-5)


@pytest.mark.parametrize(
    ("inner", "steps", "num_tasks", "inner_state"),
    [
        ("sgd", 5, 4, "reset"),
        pytest.param("sgd", 3, 1, "reset", marks=pytest.mark.slow),
        pytest.param("paper", 4, 2, "reset", marks=pytest.mark.slow),
        pytest.param("paper", 4, 1, "carry", marks=pytest.mark.slow),
        ("paper", 3, 3, "carry"),
    ],
)
def test_reptile(inner, steps, num_tasks, inner_state):
    optimizer = optax.sgd(optax.linear_schedule(0.8, 0.0, UPDATES))
    loop = em.InnerLoop(INNER[inner][0], steps)
    ours = em.Reptile(MSE, loop, optimizer, inner_state=inner_state)
    reference = Reptile(
        INNER[inner][1], steps, lambda t: 0.8 * (1 - t / UPDATES), carry=inner_state == "carry"
    )
    state = agree(ours, reference, num_tasks, tolerance=1e-5)
    if inner_state == "carry":
        (count,) = (x for x in jax.tree.leaves(state.opt_state.inner) if x.dtype == jnp.int32)
        assert int(count) == UPDATES * steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MAML", pytest.param("Reptile", marks=pytest.mark.slow)])
def test_in_float64_only_rounding_is_left(x64, name):
    """In float32 1e-5 could hide a small term; here it could not. And the derivative of an Adam
    step is a difference of large, almost equal terms, of which float32 leaves three digits."""
    loop = em.InnerLoop(optax.adam(0.02), 3)
    if name == "Reptile":
        ours = em.Reptile(MSE, loop, optax.sgd(0.5))
        reference = Reptile(adam(0.02), 3, lambda t: 0.5)
    else:
        strategy, rule = BY_GRADIENT[name]
        ours, reference = strategy(MSE, loop, OUTER["sgd"][0]), rule(adam(0.02), 3, sgd(0.03))
    agree(ours, reference, 2, tolerance=1e-10)


def test_first_order_is_another_update_than_maml():
    """The references themselves tell the algorithms apart, so that the tests above can fail."""
    tasks, w = sines(2, 5, 7, seed=0), start_weights()
    exact, first_order, pooled = (
        rule(sgd(0.05), 3, sgd(1.0)).update(w, sgd(1.0).start(w), tasks)[0]
        for rule in (MAML, FOMAML, Joint)
    )
    assert relative(exact, first_order) > 0.01
    assert relative(exact, pooled) > 0.01


# Minibatches: which examples a step sees. Example `i` is the unit vector `e_i`, the model is
# `w . x` from `w = 0` and the target 1, so that `w_i` counts the visits of example `i`.


class Dot(eqx.Module):
    w: Array

    def __call__(self, x: Array) -> Array:
        return jnp.vdot(self.w, x)


def visits(strategy, examples: int, *, key=None) -> np.ndarray:
    """How often the inner loop has visited each example."""
    size, rate = strategy.batch_size or examples, 0.25
    support = jnp.eye(examples), jnp.ones(examples)
    w = strategy.inner_adapt(Dot(jnp.zeros(examples)), support, key=key).w
    # A visit takes `w_i - 1` times `1 - 2 rate / size`. Twice in one batch, which happens where
    # one epoch ends and the next begins, is a little more than that; hence rounded.
    return np.rint(np.log1p(-np.asarray(w, np.float64)) / np.log(1 - 2 * rate / size)).astype(int)


def one_hot_reptile(steps: int, batch_size: int | None) -> em.Reptile:
    loop = em.InnerLoop(optax.sgd(0.25), steps)
    return em.Reptile(MSE, loop, optax.sgd(1.0), batch_size=batch_size)


@pytest.mark.parametrize(("examples", "batch_size", "steps"), [(12, 4, 9), (6, 1, 6), (10, 4, 5)])
def test_every_epoch_visits_every_example_once(examples, batch_size, steps):
    seen = visits(one_hot_reptile(steps, batch_size), examples, key=jax.random.key(0))
    assert np.all(seen == steps * batch_size // examples)


def test_an_unfinished_epoch_visits_no_example_twice():
    seen = visits(one_hot_reptile(2, 5), 12, key=jax.random.key(0))
    assert sorted(seen) == 2 * [0] + 10 * [1]
    seen = visits(one_hot_reptile(4, 5), 12, key=jax.random.key(0))
    assert sorted(seen) == 4 * [1] + 8 * [2]


def test_minibatches_are_shuffled_by_the_key():
    strategy = one_hot_reptile(1, 4)
    first = {tuple(visits(strategy, 12, key=jax.random.key(i))) for i in range(8)}
    assert len(first) > 4
    # Without a key the order is arbitrary but fixed.
    assert np.array_equal(visits(strategy, 12), visits(strategy, 12))


@pytest.mark.parametrize("batch_size", [None, 12, 100])
def test_no_smaller_batch_means_every_example_at_every_step(batch_size):
    strategy = one_hot_reptile(3, batch_size)
    w = strategy.inner_adapt(Dot(jnp.zeros(12)), (jnp.eye(12), jnp.ones(12))).w
    np.testing.assert_allclose(w, 1 - (1 - 2 * 0.25 / 12) ** 3, rtol=1e-5)


@pytest.mark.parametrize(("steps", "num_tasks"), [(4, 2), (1, 30)])
def test_outer_update_draws_minibatches_from_support_and_query(steps, num_tasks):
    """Four steps of three are one epoch over the 4 + 8 examples."""
    x, y = jnp.broadcast_to(jnp.eye(12), (num_tasks, 12, 12)), jnp.ones((num_tasks, 12))
    tasks = em.Task((x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:]))
    strategy = one_hot_reptile(steps, 3)
    state = strategy.init(Dot(jnp.zeros(12)))
    state, _ = strategy.outer_update(state, tasks, key=jax.random.key(5))
    visited = state.model.w / (2 * 0.25 / 3)
    if steps == 4:
        np.testing.assert_allclose(visited, 1, rtol=1e-5)
    else:
        assert len(np.unique(np.rint(num_tasks * visited))) > 2  # each task has an order of its own
