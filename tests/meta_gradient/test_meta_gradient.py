"""Meta-gradients: the exact modes against each other, finite differences and closed forms."""

import dataclasses

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta._jaxpr.finite_slopes import with_finite_slopes

from ..helpers import TinyMLP, tree_allclose

KEY = jax.random.key(0)


class Relu(eqx.Module):
    """Two hidden layers; some units are dead on small data."""

    layers: list[eqx.nn.Linear]

    def __init__(self, key: Array):
        sizes = ((1, 8), (8, 8), (8, 1))
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Linear(i, o, key=k) for (i, o), k in zip(sizes, keys, strict=True)]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def sine_task(seed: int = 0) -> em.Task:
    x = np.random.default_rng(seed).uniform(-2, 2, (12, 1))
    x, y = jnp.asarray(x, float), jnp.asarray(1.5 * np.sin(2 * x), float)
    return em.Task((x[:5], y[:5]), (x[5:], y[5:]))


def flat_objective(loss, optimizer, steps: int, model, task: em.Task):
    """`loss(adapted, query)` as a function of the flat parameters and of the mode; the start."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def objective(flat: Array, mode: str) -> Array:
        loop = em.InnerLoop(optimizer, steps, mode)
        adapted = loop(loss, eqx.combine(unravel(flat), static), task.support).model
        return loss(adapted, task.query, None)[0]

    return objective, flat


def both_modes(objective, flat: Array) -> tuple[np.ndarray, np.ndarray]:
    def grads(flat):
        return [jax.grad(objective)(flat, mode) for mode in ("mixed", "reverse")]

    mixed, reverse = jax.jit(grads)(flat)
    return np.asarray(mixed), np.asarray(reverse)


def error(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def finite_differences(objective, flat: Array, directions: np.ndarray) -> np.ndarray:
    """Central, of fourth order, along each row of `directions`."""
    value, h = jax.jit(lambda flat: objective(flat, "reverse")), 1e-4
    return np.array(
        [
            (
                8 * (value(flat + h * d) - value(flat - h * d))
                - (value(flat + 2 * h * d) - value(flat - 2 * h * d))
            )
            / (12 * h)
            for d in directions
        ]
    )


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.02),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.02),
    # The norm of the gradient is far above 0.1: the clip is active.
    "clip": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
    "adam_schedule": optax.adam(optax.linear_schedule(0.05, 0.0, 4), b1=0.0),
}


@pytest.mark.parametrize(
    ("name", "steps", "architecture"),
    [
        pytest.param("sgd", 8, Relu, marks=pytest.mark.slow),
        pytest.param("momentum", 4, TinyMLP, marks=pytest.mark.slow),
        ("adam", 1, TinyMLP),
        pytest.param("adamw", 3, TinyMLP, marks=pytest.mark.slow),
        pytest.param("rmsprop", 2, TinyMLP, marks=pytest.mark.slow),
        ("clip", 3, Relu),
        ("adam_schedule", 5, TinyMLP),
    ],
)
def test_exact_modes_agree_with_finite_differences_in_float64(x64, name, steps, architecture):
    model = architecture(jax.random.key(1))
    objective, flat = flat_objective(em.losses.mse, OPTIMIZERS[name], steps, model, sine_task())
    mixed, reverse = both_modes(objective, flat)
    assert error(mixed, reverse) < 1e-9
    directions = np.random.default_rng(0).standard_normal((3, flat.size)) / np.sqrt(flat.size)
    slopes = finite_differences(objective, flat, directions)
    assert error(directions @ mixed, slopes) < 1e-5
    assert error(directions @ reverse, slopes) < 1e-5


@pytest.mark.parametrize(
    ("name", "steps"), [("sgd", 8), pytest.param("adamw", 3, marks=pytest.mark.slow)]
)
def test_exact_modes_agree_in_float32(name, steps):
    model = Relu(jax.random.key(1))
    objective, flat = flat_objective(em.losses.mse, OPTIMIZERS[name], steps, model, sine_task())
    mixed, reverse = both_modes(objective, flat)
    assert mixed.dtype == np.float32
    assert error(mixed, reverse) < 1e-4
    # It is not the first-order gradient that both agree on.
    first_order = jax.jit(jax.grad(lambda flat: objective(flat, "first_order")))(flat)
    assert error(first_order, reverse) > 1e-2


@pytest.mark.slow
def test_models_with_loops_and_classification(x64):
    """A recurrent model, labels that are integers, and a non-array leaf."""

    class Recurrent(eqx.Module):
        cell: eqx.nn.GRUCell
        out: eqx.nn.Linear
        activation: object = jax.nn.tanh

        def __call__(self, x):
            last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(4), x[:, None])
            return self.out(self.activation(last))

    model = Recurrent(eqx.nn.GRUCell(1, 4, key=KEY), eqx.nn.Linear(4, 3, key=KEY))
    x = jax.random.normal(KEY, (9, 5))
    y = jnp.arange(9) % 3
    task = em.Task((x[:6], y[:6]), (x[6:], y[6:]))
    objective, flat = flat_objective(em.losses.cross_entropy, optax.sgd(0.3), 2, model, task)
    mixed, reverse = both_modes(objective, flat)
    assert error(mixed, reverse) < 1e-10
    directions = np.random.default_rng(0).standard_normal((2, flat.size))
    slopes = finite_differences(objective, flat, directions)
    assert error(directions @ mixed, slopes) < 1e-6


# Closed forms: the inner loss is 1/2 (w - a)' H (w - a), the outer one 1/2 |w - b|^2. After K
# steps of gradient descent w' = a + M (w - a) with M = (1 - rate H)^K.


class Point(eqx.Module):
    w: Array


H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]])
A, B, W = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -1.0]), np.array([-1.0, 0.4, 2.0])


def quadratic(model: Point, batch, key):
    target, curvature = batch
    d = model.w - target[0]
    return 0.5 * d @ curvature[0] @ d, {}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("mode", ["mixed", "reverse", "first_order"])
def test_quadratic_in_closed_form(x64, mode, steps):
    rate = 0.2
    loop = em.InnerLoop(optax.sgd(rate), steps, mode)

    @jax.jit
    def gradients(w, a):
        def objective(w, a):
            adapted = loop(quadratic, Point(w), (a[None], jnp.asarray(H)[None])).model
            return 0.5 * jnp.sum((adapted.w - B) ** 2), adapted.w

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(w, a)

    (along_w, along_a), adapted = gradients(jnp.asarray(W), jnp.asarray(A))
    power = np.linalg.matrix_power(np.eye(3) - rate * H, steps)
    expected = A + power @ (W - A)
    np.testing.assert_allclose(adapted, expected, rtol=1e-12)
    through = np.eye(3) if mode == "first_order" else power
    np.testing.assert_allclose(along_w, through @ (expected - B), rtol=1e-12)
    # The support set is differentiated as well: it may have been made by something learnt.
    np.testing.assert_allclose(along_a, (np.eye(3) - through) @ (expected - B), atol=1e-12)


class Pair(eqx.Module):
    w: Array
    center: Array


@pytest.mark.parametrize("mode", ["mixed", "reverse", "first_order"])
@pytest.mark.parametrize("stopped", [False, True])
def test_leaves_that_the_inner_loop_holds_fixed(x64, mode, stopped):
    """`w` adapts towards `center`, which is meta-learnt only: through the inner gradient."""

    def loss(model: Pair, batch, key):
        if batch is None:
            return 0.5 * jnp.sum((model.w - B) ** 2), {}
        center = jax.lax.stop_gradient(model.center) if stopped else model.center
        return 0.5 * jnp.sum((model.w - center) ** 2), {}

    held = optax.partition(
        {"learn": optax.sgd(0.2), "hold": optax.set_to_zero()}, Pair("learn", "hold")
    )
    model = Pair(jnp.asarray(W), jnp.asarray(A))
    loop = em.InnerLoop(held, 3, mode)
    batch = jnp.zeros(1)

    def objective(model):
        adapted = loop(loss, model, batch).model
        return loss(adapted, None, None)[0], adapted

    grads, adapted = jax.jit(jax.grad(objective, has_aux=True))(model)
    left = 0.8**3
    np.testing.assert_allclose(adapted.center, A)
    np.testing.assert_allclose(adapted.w, A + left * (W - A), rtol=1e-12)
    exact = mode != "first_order"
    error_after = A + left * (W - A) - B
    np.testing.assert_allclose(grads.w, (left if exact else 1) * error_after, rtol=1e-12)
    flows = exact and not stopped
    np.testing.assert_allclose(grads.center, (1 - left) * error_after * flows, atol=1e-12)


# Adam and units that are dead.


class Unit(eqx.Module):
    """`c + v relu(u x)`: with `u < 0` dead for `x > 0`, alive for `x < 0`."""

    u: Array
    v: Array
    c: Array

    def __call__(self, x: Array) -> Array:
        return self.c + self.v * jax.nn.relu(self.u * x)


ADAMS = {
    "adam": optax.adam(0.1),
    "b1=0": optax.adam(0.1, b1=0.0),
    "amsgrad": optax.amsgrad(0.1),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(100.0), optax.adam(0.1)),
}


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        "chain",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("b1=0", "amsgrad", "injected")),
    ],
)
def test_adam_with_a_dead_unit(name):
    """On the support the unit gets no gradient, so that Adam's moments stay exactly zero; on the
    query it is alive, and what it hears from there must not be lost in a NaN."""
    u, v, c, query, target = -0.5, 2.0, 0.3, -1.5, 4.0
    support = jnp.array([0.5, 1.0]), jnp.array([1.0, 1.0])

    def objective(model, mode):
        adapted = em.InnerLoop(ADAMS[name], 1, mode)(em.losses.mse, model, support).model
        return (adapted(jnp.array(query)) - target) ** 2, adapted

    @jax.jit
    def gradients(model):
        return [jax.grad(objective, has_aux=True)(model, mode) for mode in ("mixed", "reverse")]

    for grads, adapted in gradients(Unit(jnp.array(u), jnp.array(v), jnp.array(c))):
        # The first step of Adam is one learning rate long; `u` and `v` do not move.
        assert float(adapted.c) == pytest.approx(c + 0.1, rel=1e-5)
        assert (float(adapted.u), float(adapted.v)) == (u, v)
        residual = 2 * (c + 0.1 + v * u * query - target)
        assert float(grads.u) == pytest.approx(residual * v * query, rel=1e-4)
        assert float(grads.v) == pytest.approx(residual * u * query, rel=1e-4)
        assert float(grads.c) == pytest.approx(residual, rel=1e-4)


def test_adam_without_the_safe_root_gives_nan():
    """Why the test above is there. When this fails, JAX or optax have changed, for the better."""

    def update(g):
        adam = optax.adam(0.1)
        return adam.update(g, adam.init(g))[0]

    assert np.isnan(jax.grad(update)(jnp.zeros(())))
    assert np.isfinite(jax.grad(with_finite_slopes(update))(jnp.zeros(())))


@pytest.mark.slow
def test_adam_on_a_network_with_dead_units_in_float64(x64):
    model = Relu(jax.random.key(3))
    # The bias kills three units of the first layer on all inputs.
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, replace_fn=lambda b: b.at[:3].set(-10))
    objective, flat = flat_objective(em.losses.mse, optax.adam(0.01), 3, model, sine_task())
    mixed, reverse = both_modes(objective, flat)
    assert np.all(np.isfinite(mixed)) and error(mixed, reverse) < 1e-9
    assert np.sum(reverse == 0) >= 3
    directions = np.random.default_rng(0).standard_normal((3, flat.size)) / np.sqrt(flat.size)
    slopes = finite_differences(objective, flat, directions)
    assert error(directions @ mixed, slopes) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_safe_sqrt(dtype):
    safe_sqrt = with_finite_slopes(jnp.sqrt)
    x = jnp.array([0.0, 0.25, 4.0], dtype)
    assert tree_allclose(safe_sqrt(x), jnp.sqrt(x), rtol=0, atol=0)
    slope = jax.jit(jax.vmap(jax.grad(safe_sqrt)))(x)
    assert slope.dtype == dtype
    np.testing.assert_allclose(np.asarray(slope, np.float32), [0.0, 1.0, 0.25], rtol=1e-2)
    _, tangent = jax.jvp(safe_sqrt, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, slope)
    assert float(jax.grad(jax.grad(safe_sqrt))(jnp.ones(()))) == pytest.approx(-0.25)


def test_every_root_of_a_traced_function_is_made_safe():
    """Inside nested `jit`, beside custom rules, with constants and several outputs."""
    scale = jnp.array([2.0, 3.0])

    @jax.jit
    def nested(x):
        return {"root": jnp.sqrt(x) * scale, "rest": jax.nn.relu(x) + jax.nn.softplus(x)}

    def fun(x, count):
        out = nested(x)
        return out["root"].sum() * x.sum(), (out["rest"], count + 1, None)

    x, count = jnp.array([0.0, 4.0]), jnp.array(1)
    safe = with_finite_slopes(fun)
    assert tree_allclose(safe(x, count), fun(x, count))
    assert tree_allclose(jax.jit(safe)(x, count), fun(x, count))
    grads = jax.grad(safe, has_aux=True)(x, count)[0]
    # d/dx of (2 sqrt(x0) + 3 sqrt(x1)) (x0 + x1), with 0 for the slope of the root at 0.
    np.testing.assert_allclose(grads, [6.0, 6.0 + 3 * 0.25 * 4], rtol=1e-6)


def test_a_learnt_learning_rate_is_differentiated(x64):
    """The inner optimizer may close over what an outer transformation traces."""

    def objective(rate):
        loop = em.InnerLoop(optax.chain(optax.scale_by_adam(), optax.scale(-rate)), 2)
        adapted = loop(em.losses.mse, TinyMLP(KEY), sine_task().support).model
        return em.losses.mse(adapted, sine_task().query, None)[0]

    slope = jax.jit(jax.grad(objective))(0.05)
    value, h = jax.jit(objective), 1e-5
    expected = (value(0.05 + h) - value(0.05 - h)) / (2 * h)
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)


class WithDecay(eqx.Module):
    """A loss that is a module and holds arrays: a weight decay, and which examples count."""

    decay: Array
    counts: Array

    def __call__(self, model, batch, key):
        x, y = batch
        errors = jnp.sum((em.losses.predict(model, x) - y) ** 2, axis=1)
        norm = sum(jnp.sum(x**2) for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        return jnp.mean(errors * self.counts) + self.decay * norm, {}


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_loss_that_holds_arrays(x64, steps):
    tasks = jax.tree.map(lambda *xs: jnp.stack(xs), sine_task(0), sine_task(1))
    tasks = em.Task(tasks.support, tasks.support)
    loss = WithDecay(jnp.array(0.1), jnp.array([1, 0, 1, 1, 1]))

    def updated(mode, task_chunk):
        inner = em.InnerLoop(optax.sgd(0.1), steps, mode)
        strategy = em.MAML(loss, inner, optax.sgd(1.0), task_chunk=task_chunk)
        return strategy.outer_update(strategy.init(TinyMLP(KEY)), tasks, key=None)[0].model

    expected = updated("reverse", None)
    for other in (("mixed", None), ("mixed", 1)):
        assert tree_allclose(updated(*other), expected, rtol=1e-9)


def test_what_a_loss_closes_over_is_learnt(x64):
    """A weight decay that the loss has from outside is differentiated, as `"reverse"` does."""
    task = sine_task()

    def objective(decay, mode):
        loss = WithDecay(decay, jnp.ones(5, int))
        adapted = em.InnerLoop(optax.sgd(0.1), 3, mode)(loss, TinyMLP(KEY), task.support).model
        return em.losses.mse(adapted, task.query, None)[0]

    mixed, reverse = both_modes(objective, jnp.array(0.1))
    assert abs(reverse) > 1e-3
    np.testing.assert_allclose(mixed, reverse, rtol=1e-10)


# Where "mixed" must not be used.


@jax.custom_vjp
def rounded(x):
    """Straight-through: rounds, but passes the gradient on as if it had not."""
    return jnp.round(4 * x) / 4


rounded.defvjp(lambda x: (jnp.round(4 * x) / 4, None), lambda _, g: (g,))


@jax.custom_vjp
def rounded_again(x):
    """The same, written as in JAX's documentation: the forward rule calls the function itself,
    which forward-mode differentiation refuses."""
    return jnp.round(4 * x) / 4


rounded_again.defvjp(lambda x: (rounded_again(x), None), lambda _, g: (g,))


class TwoLayers(eqx.Module):
    w: Array
    u: Array


def straight_through(model: TwoLayers, batch, key, rounded=rounded):
    """Rounds the weights on the support set, given as a pair; the query set is a triple."""
    x, y, *query = batch
    w = model.w if query else rounded(model.w)
    return jnp.mean((jnp.tanh(x @ w) @ model.u - y) ** 2), {}


def two_layers_and_task() -> tuple[TwoLayers, em.Task]:
    keys = jax.random.split(jax.random.key(7), 6)
    x, y, w, u, query_x, query_y = (
        jax.random.normal(k, shape)
        for k, shape in zip(keys, [(6, 3), (6,), (3, 3), (3,), (6, 3), (6,)], strict=True)
    )
    return TwoLayers(w, u), em.Task((x, y), (query_x, query_y, query_y))


def test_check_warns_of_a_straight_through_loss():
    model, task = two_layers_and_task()
    strategy = em.MAML(straight_through, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, model, task)
    assert not check.ok
    assert check.mixed_vs_reverse > 1e-2
    assert check.mixed_vs_finite_differences > 1e-2
    # The query loss is smooth, so that finite differences are the truth here.
    assert check.reverse_vs_finite_differences < 1e-6
    assert "gradient='reverse'" in str(check)


class StraightThrough(eqx.Module):
    """Two layers, the weights of the first rounded with what is hidden by `stop_gradient`."""

    w: Array
    u: Array

    def __call__(self, x):
        w = self.w + jax.lax.stop_gradient(jnp.round(4 * self.w) / 4 - self.w)
        hidden = jnp.tanh(w @ x)
        hidden = hidden * jax.lax.stop_gradient(jnp.exp(hidden))
        return jnp.tanh(self.u @ hidden + jax.lax.stop_gradient(self.u @ w) @ x)


def test_stop_gradient_does_not_part_the_modes():
    """Also between layers and on a product of parameters: what it hides is a constant in both. But
    neither is the derivative of what is evaluated, and the check says so."""
    keys = jax.random.split(jax.random.key(3), 2)
    model = StraightThrough(jax.random.normal(keys[0], (3, 1)), jax.random.normal(keys[1], (1, 3)))
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 3), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, model, sine_task())
    assert check.ok and check.mixed_vs_reverse < 1e-12
    assert check.mixed_vs_finite_differences > 0.05
    assert "use gradient='mixed'" in str(check) and "Neither mode" in str(check)


@pytest.mark.parametrize(("through", "expected"), [(True, np.inf), (False, 0.0)])
def test_check_of_slopes_that_are_zero(through, expected):
    """Those of a step function, whose gradient, passed straight through, is not."""

    def loss(model, batch, key):
        return jnp.sum(rounded(model.w) if through else jnp.round(model.w)), {}

    strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, Point(jnp.array([0.7])), em.Task(A[:1], A[:1]))
    assert check.reverse_vs_finite_differences == expected
    assert ("Neither mode" in str(check)) == through


def test_check_reports_where_mixed_cannot_be_computed():
    def loss(model, batch, key):
        return straight_through(model, batch, key, rounded_again)

    model, task = two_layers_and_task()
    strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, model, task)
    assert not check.ok
    assert check.mixed_vs_reverse == np.inf
    # Not compared with finite differences: differentiated again, this loss passes a gradient
    # straight through its own forward rule, in "reverse" as well.
    assert "gradient='reverse'" in str(check)


def test_mixed_says_what_to_do_where_it_cannot_be_computed():
    def loss(model, batch, key):
        return straight_through(model, batch, key, rounded_again)

    model, task = two_layers_and_task()
    tasks = jax.tree.map(lambda x: x[None], task)
    strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0))
    with pytest.raises(TypeError, match=r"Expected: (?s:.*)gradient='reverse'"):
        strategy.outer_update(strategy.init(model), tasks, key=None)


def test_reverse_is_what_jax_does(x64):
    """Also where it cannot be compared with anything else."""
    model, task = jax.tree.map(lambda x: x.astype(jnp.float64), two_layers_and_task())

    def by_hand(model):
        adapted = model
        for _ in range(2):
            grads = jax.grad(lambda m: straight_through(m, task.support, None)[0])(adapted)
            adapted = jax.tree.map(lambda p, g: p - 0.1 * g, adapted, grads)
        return straight_through(adapted, task.query, None)[0]

    def ours(model):
        adapted = em.InnerLoop(optax.sgd(0.1), 2, "reverse")(straight_through, model, task.support)
        return straight_through(adapted.model, task.query, None)[0]

    assert tree_allclose(jax.jit(jax.grad(ours))(model), jax.jit(jax.grad(by_hand))(model))


def test_check_passes_an_ordinary_loss():
    strategy = em.FOMAML(em.losses.mse, em.InnerLoop(optax.adam(0.01), 3), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, TinyMLP(KEY), sine_task())
    assert check.ok
    assert check.mixed_vs_finite_differences < 1e-5
    assert check.reverse_vs_finite_differences < 1e-5
    assert "use gradient='mixed'" in str(check) and "Neither" not in str(check)
    # `ok` looks at nothing but the tolerance.
    assert not dataclasses.replace(check, tolerance=check.mixed_vs_reverse / 2 - 1e-300).ok


def test_check_wants_an_inner_loop():
    class Bare(em.Strategy):
        loss = staticmethod(em.losses.mse)

        def init(self, model):
            raise NotImplementedError

        def inner_adapt(self, model, support, *, key=None):
            return model

        def outer_update(self, state, tasks, *, key):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"check_meta_gradient(?s:.*)Received: (?s:.*)Expected: "):
        em.check_meta_gradient(Bare(), TinyMLP(KEY), sine_task())


def complex_loss(model: Point, batch, key):
    return jnp.mean(jnp.abs(batch * model.w - 1) ** 2), {}


@pytest.mark.parametrize(
    "name, told",
    [("MAML", False), ("Reptile", True), pytest.param("Joint", False, marks=pytest.mark.slow)],
)
def test_the_check_says_for_which_strategies_it_is(name, told):
    strategy = getattr(em, name)(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, TinyMLP(KEY), sine_task())
    assert check.ok
    assert (f"the outer step of `{name}` is its own" in str(check)) == told


def test_complex_parameters_are_refused_in_mixed_mode():
    model, batch = Point(jnp.array(1 + 1j)), jnp.arange(1.0, 4.0)
    with pytest.raises(
        TypeError, match=r"'mixed'(?s:.*)Received: leaf `model\.w` of dtype complex"
    ):
        em.InnerLoop(optax.sgd(0.1), 2)(complex_loss, model, batch)
    adapted = em.InnerLoop(optax.sgd(0.01), 2, "reverse")(complex_loss, model, batch).model
    assert adapted.w.dtype == jnp.complex64


def to_one_plus_i(model: Point, batch, key):
    return jnp.sum(jnp.abs(model.w - (1 + 1j) * jnp.mean(batch)) ** 2), {}


def test_complex_parameters_go_downhill():
    """Inner and outer steps on |w - (1 + i)|^2, of which each halves the distance."""
    start, one = Point(jnp.array([3 - 2j, 0j])), jnp.ones(2)
    loop = em.InnerLoop(optax.sgd(0.25), 2, "reverse")
    left = np.asarray(loop(to_one_plus_i, start, one).model.w) - (1 + 1j)
    np.testing.assert_allclose(left, (np.asarray(start.w) - (1 + 1j)) / 4, atol=1e-6)
    tasks = em.Task(jnp.ones((3, 2)), jnp.ones((3, 2)))
    once = em.InnerLoop(optax.sgd(0.25), 1)
    # MAML's outer step is of rate 1 on |w - (1 + i)|^2 / 4, Reptile's is to where a task arrives.
    for strategy in (
        em.MAML(to_one_plus_i, once, optax.sgd(1.0)),
        em.Reptile(to_one_plus_i, once, optax.sgd(1.0)),
    ):
        state, _ = strategy.outer_update(strategy.init(start), tasks, key=None)
        moved = np.asarray(state.model.w) - (1 + 1j)
        np.testing.assert_allclose(moved, (np.asarray(start.w) - (1 + 1j)) / 2, atol=1e-6)


def test_a_complex_meta_gradient_is_that_of_finite_differences(x64):
    start, batch = jnp.array([0.7 + 0.2j, -0.3 + 1j]), jnp.array([1 + 2j, 0.5])

    def loss(model, batch, key):
        return jnp.sum(jnp.abs(jnp.sin(batch * model.w) - 1) ** 2), {}

    def objective(w):
        adapted = em.InnerLoop(optax.sgd(0.1), 3, "reverse")(loss, Point(w), batch).model
        return loss(adapted, batch + 1, None)[0]

    value, h = jax.jit(objective), 1e-6
    grads = np.asarray(jax.jit(jax.grad(objective))(start))
    # JAX's convention: the derivative along `d` is the real part of the sum of `grads * d`.
    for d in np.array([[1, 0], [1j, 0], [0, 1], [0, 1j]]):
        slope = (value(start + h * d) - value(start - h * d)) / (2 * h)
        np.testing.assert_allclose(np.real(np.sum(grads * d)), slope, rtol=1e-6)


def test_check_of_complex_parameters():
    def loss(model, batch, key):
        return jnp.sum(jnp.abs(jnp.sin(batch * model.w) - 1) ** 2), {}

    model, batch = Point(jnp.array([0.7 + 0.2j])), jnp.array([1 + 2j])
    strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.01), 2, "reverse"), optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, model, em.Task(batch, batch + 1))
    assert check.mixed_vs_reverse == np.inf
    assert check.reverse_vs_finite_differences < 1e-6


def test_complex_data_is_not(x64):
    """Real parameters may be fitted to complex data, and the data be differentiated."""
    batch = jnp.array([1 + 2j, -0.5j, 0.3 + 0j])

    def objective(w, batch, mode):
        def loss(model, batch, key):
            return jnp.mean(jnp.abs(jnp.exp(batch * model.w) - 1) ** 2), {}

        adapted = em.InnerLoop(optax.sgd(0.1), 2, mode)(loss, Point(w), batch).model
        return adapted.w**2

    grads = [
        jax.jit(jax.grad(lambda w, b, m=mode: objective(w, b, m), argnums=(0, 1)))(
            jnp.array(0.7), batch
        )
        for mode in ("mixed", "reverse")
    ]
    assert tree_allclose(*grads, rtol=1e-10)
    assert all(np.all(np.abs(g) > 1e-3) for g in grads[0])


# Cost, of programs that are compiled and never run.


def wide_mlp_and_tasks():
    model = eqx.nn.MLP(4, 1, 32, 3, key=KEY)
    x, y = jnp.zeros((1, 1024, 4)), jnp.zeros((1, 1024, 1))
    return model, em.Task((x, y), (x[:, :16], y[:, :16]))


def program(cls, steps: int, gradient: str = "mixed"):
    """`outer_update` as a function of arrays, and its arguments."""
    model, tasks = wide_mlp_and_tasks()
    strategy = cls(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps, gradient), optax.sgd(0.1))
    arrays, static = eqx.partition(strategy.init(model), eqx.is_array)

    def update(arrays, tasks):
        state, metrics = strategy.outer_update(eqx.combine(arrays, static), tasks, key=None)
        return eqx.filter(state, eqx.is_array), metrics

    return update, (arrays, tasks)


def temporary_memory(cls, steps: int, gradient: str = "mixed") -> int:
    update, args = program(cls, steps, gradient)
    return jax.jit(update).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory():
    fomaml = {k: temporary_memory(em.FOMAML, k) for k in (1, 64)}
    # FOMAML keeps no graph through the inner loop, whatever mode the inner loop was made with.
    assert fomaml[64] < 1.1 * fomaml[1] + 2**16
    # "reverse" keeps at least the activations of every step, 1024 x 32 floats a layer.
    reverse = temporary_memory(em.MAML, 64, "reverse")
    assert reverse > 64 * 2 * 1024 * 32 * 4
    # "mixed" keeps the parameters of every step.
    mixed = temporary_memory(em.MAML, 64, "mixed")
    parameters = sum(x.nbytes for x in jax.tree.leaves(wide_mlp_and_tasks()[0]) if eqx.is_array(x))
    assert mixed < reverse / 10
    assert mixed - fomaml[64] < 2 * 64 * parameters + 2**20


def equations(jaxpr) -> int:
    """Equations of a program, those inside of loops and calls included."""
    return sum(line.count(" = ") for line in str(jaxpr).splitlines())


@pytest.mark.parametrize("gradient", ["mixed", "reverse", "first_order"])
def test_programs_do_not_grow_with_the_number_of_inner_steps(gradient):
    def size(steps):
        objective, flat = flat_objective(
            em.losses.mse, optax.adam(0.01), steps, TinyMLP(KEY), sine_task()
        )
        return equations(jax.make_jaxpr(jax.grad(lambda f: objective(f, gradient)))(flat))

    assert size(2) == size(64)


def test_outer_updates_grow_by_their_metrics_only():
    """There is a metric `support_loss/<i>` for each inner step: a few equations."""

    def size(steps):
        update, args = program(em.MAML, steps)
        return equations(jax.make_jaxpr(update)(*args))

    per_step = (size(34) - size(2)) / 32
    assert per_step < 12
    assert size(2) > 200
