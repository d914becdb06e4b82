"""IMAML: the gradient of the solved inner problem, whatever the way to its solution."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import eqxmeta as em

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
STRENGTH = 5.0
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def imaml(optimizer=None, steps=150, gradient: Any = "mixed", adapt=None, outer=None, **options):
    inner = em.InnerLoop(optimizer or optax.sgd(0.07), steps, gradient, adapt=adapt)
    options = {"strength": STRENGTH, "cg_steps": 40} | options
    return em.IMAML(em.losses.mse, inner, outer or optax.sgd(1.0), **options)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def batch(count=2, shots=5):
    return wide(jax.vmap(em.tasks.Sinusoid(shots, 7).sample)(jax.random.split(KEY, count)))


def head(model):
    return model.out


def meta_gradient(strategy, model, tasks):
    """Of an outer step with `sgd(1.0)`, as a flat vector; and the step's metrics."""
    state, metrics = strategy.outer_update(strategy.init(model), tasks, key=KEY)
    flat, moved = ravel_pytree(model)[0], ravel_pytree(state.model)[0]
    return np.asarray(flat - moved), metrics


class Solved:
    """The inner problem solved by Newton's method on the flat parameters, of which those in `mask`
    adapt; and its implicit gradient by a dense solve. Knows nothing of the library."""

    def __init__(self, model, mask):
        self.flat, self.unravel = ravel_pytree(model)
        self.mask = np.asarray(ravel_pytree(mask)[0], bool)

    def loss(self, phi, others, examples):
        whole = jnp.zeros(self.flat.shape).at[self.mask].set(phi).at[~self.mask].set(others)
        model = self.unravel(whole)
        x, y = examples
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    def solution(self, theta, others, support):
        def newton(phi, _):
            gradient = jax.grad(self.loss)(phi, others, support) + STRENGTH * (phi - theta)
            hessian = jax.hessian(self.loss)(phi, others, support)
            return phi - jnp.linalg.solve(hessian + STRENGTH * jnp.eye(phi.size), gradient), None

        return jax.lax.scan(newton, theta, length=15)[0]

    def objective(self, flat, tasks):
        def one(support, query):
            theta, others = flat[self.mask], flat[~self.mask]
            return self.loss(self.solution(theta, others, support), others, query)

        return jnp.mean(jax.vmap(one)(tasks.support, tasks.query))

    def gradient(self, tasks):
        theta, others = self.flat[self.mask], self.flat[~self.mask]

        def one(support, query):
            phi = self.solution(theta, others, support)
            g, direct = jax.grad(self.loss, (0, 1))(phi, others, query)
            hessian = jax.hessian(self.loss)(phi, others, support)
            cross = jax.jacobian(jax.grad(self.loss), 1)(phi, others, support)
            v = jnp.linalg.solve(jnp.eye(phi.size) + hessian / STRENGTH, g)
            return v, direct - cross.T @ v / STRENGTH

        of_theta, of_others = jax.vmap(one)(tasks.support, tasks.query)
        whole = jnp.zeros(self.flat.shape).at[self.mask].set(of_theta.mean(0))
        return whole.at[~self.mask].set(of_others.mean(0))


def solved(adapt=None):
    model = wide(tiny_mlp())
    mask = jax.tree.map(lambda x: jnp.full(x.shape, adapt is None), model)
    if adapt is not None:
        ones = jax.tree.map(jnp.ones_like, adapt(mask))
        mask = eqx.tree_at(adapt, mask, ones)
    return model, Solved(model, mask)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("gradient", "adapt"),
    [
        pytest.param("mixed", None, marks=pytest.mark.slow),
        ("mixed", head),
        pytest.param("reverse", None, marks=pytest.mark.slow),
        ("reverse", head),
    ],
)
def test_at_convergence_it_is_the_dense_solve(x64, gradient, adapt):
    """Of what adapts, and of what does not, on which the minimum depends."""
    (model, reference), tasks = solved(adapt), batch()
    ours, metrics = meta_gradient(imaml(gradient=gradient, adapt=adapt), model, tasks)
    assert relative(ours, jax.jit(reference.gradient)(tasks)) < 1e-9
    expected = jax.jit(reference.objective)(reference.flat, tasks)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    assert metrics["cg_residual"] < 1e-12


def test_it_is_the_slope_of_the_solved_problem(x64):
    (model, reference), tasks = solved(head), batch()
    ours, _ = meta_gradient(imaml(adapt=head), model, tasks)
    objective, h = jax.jit(reference.objective), 1e-4
    for direction in np.random.default_rng(0).standard_normal((3, ours.size)) / 5:
        ends = (objective(reference.flat + s * h * direction, tasks) for s in (1, -1))
        slope = np.subtract(*ends) / (2 * h)
        np.testing.assert_allclose(ours @ direction, slope, rtol=1e-6, atol=1e-8)


def test_the_way_does_not_matter(x64):
    """Another optimizer, with another path to the same minimum."""
    model, tasks = wide(tiny_mlp()), batch()
    by_sgd, _ = meta_gradient(imaml(), model, tasks)
    momentum = optax.sgd(0.04, momentum=0.5)
    by_momentum, _ = meta_gradient(imaml(momentum), model, tasks)
    assert relative(by_momentum, by_sgd) < 1e-9


def test_few_steps_of_conjugate_gradients_leave_the_residual_that_is_reported(x64):
    """One step is known: `v = g (g.g)/(g.A g)`."""
    (model, reference), tasks = solved(), batch(1)
    ours, metrics = meta_gradient(imaml(cg_steps=1), model, tasks)
    support, query = (jax.tree.map(lambda x: x[0], part) for part in (tasks.support, tasks.query))
    others = reference.flat[:0]

    @jax.jit
    def slope_and_hessian(support, query):
        phi = reference.solution(reference.flat, others, support)
        hessian = jax.hessian(reference.loss)(phi, others, support)
        return jax.grad(reference.loss)(phi, others, query), hessian

    g, hessian = map(np.asarray, slope_and_hessian(support, query))
    system = np.eye(g.size) + hessian / STRENGTH
    v = g * (g @ g) / (g @ system @ g)
    np.testing.assert_allclose(ours, v, rtol=1e-8, atol=1e-10)
    residual = np.linalg.norm(g - system @ v) / np.linalg.norm(g)
    assert residual > 0.1
    np.testing.assert_allclose(metrics["cg_residual"], residual, rtol=1e-8)


@pytest.mark.parametrize(
    # The system is 1 - 0.8, 1 - 0.95 and 1 - 3.
    ("curvature", "solution", "ended"),
    [(-0.8, 5.0, 0.0), (-0.95, 1.0, 1.0), (-3.0, 1.0, 1.0)],
)
def test_where_the_support_loss_curves_down_the_gradient_of_the_query_loss_is_left(
    x64, curvature, solution, ended
):
    def loss(w, batch, key):
        return jnp.mean(batch) * w @ w / 2, {}

    w, ones = jnp.array([1.0, -2.0]), np.ones((1, 2))
    strategy = em.IMAML(loss, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(1.0), strength=1.0)
    state, metrics = strategy.outer_update(
        strategy.init(w), em.Task(curvature * ones, ones), key=None
    )
    np.testing.assert_allclose(w - state.model, solution * (1 - 0.1 * curvature) * w, rtol=1e-12)
    assert metrics["negative_curvature"] == ended


def test_without_a_hessian_it_is_fomaml(x64):
    """The first step is the same for both: the pull towards θ begins with the second."""
    model, tasks = wide(tiny_mlp()), batch()
    ours, metrics = meta_gradient(imaml(steps=1, gradient="first_order"), model, tasks)
    fomaml = em.FOMAML(em.losses.mse, em.InnerLoop(optax.sgd(0.07), 1), optax.sgd(1.0))
    theirs, expected = meta_gradient(fomaml, model, tasks)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-12)
    np.testing.assert_allclose(metrics["support_loss/0"], expected["support_loss/0"], rtol=1e-12)
    with_hessian, _ = meta_gradient(imaml(steps=1), model, tasks)
    assert relative(with_hessian, ours) > 0.1


@pytest.mark.parametrize("gradient", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_inner_steps(gradient):
    tasks = jax.vmap(em.tasks.Sinusoid(5, 7).sample)(jax.random.split(KEY, 8))

    def temp_bytes(make, steps):
        strategy = make(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps, gradient), optax.sgd(1))
        state = strategy.init(tiny_mlp())
        dynamic, static = eqx.partition(state, eqx.is_array)

        def new_model(dynamic, tasks):
            state, _ = strategy.outer_update(eqx.combine(dynamic, static), tasks, key=None)
            return eqx.filter(state.model, eqx.is_array)

        compiled = jax.jit(new_model).lower(dynamic, tasks).compile()
        return getattr(compiled.memory_analysis(), "temp_size_in_bytes")  # noqa: B009

    few, many = (temp_bytes(em.IMAML, steps) for steps in (5, 205))
    few_of_maml, many_of_maml = (temp_bytes(em.MAML, steps) for steps in (5, 205))
    # But for the losses that are reported, a number a step and task.
    assert many - few < 3 * 200 * 8 * 4
    assert many_of_maml - few_of_maml > 10 * (many - few)


@pytest.mark.slow
def test_another_call_goes_on_towards_the_same_minimum():
    """The point that the loop is pulled to is a part of its state."""
    strategy, task = imaml(steps=6), em.tasks.Sinusoid(5, 7).sample(KEY)
    whole = strategy.inner_rollout(tiny_mlp(), task.support)
    first = strategy.inner_rollout(tiny_mlp(), task.support, steps=2)
    rest = strategy.inner_rollout(
        first.model, task.support, steps=4, start=2, opt_state=first.opt_state
    )
    assert tree_allclose(rest.model, whole.model, rtol=1e-6)
    anew = strategy.inner_rollout(first.model, task.support, steps=4)
    assert not tree_allclose(anew.model, whole.model, rtol=1e-2)


def test_an_inner_optimizer_that_looks_at_the_value_is_given_that_of_the_proximal_loss(x64):
    """Its rate is the value here: of the second step the loss at φ and the pull."""

    def update(updates, state, params=None, **told):
        return jax.tree.map(lambda g: -0.1 * told["value"] * g, updates), state

    by_value = optax.GradientTransformationExtraArgs(lambda params: (), update)
    (model, reference), tasks = solved(), batch(1)
    support = jax.tree.map(lambda x: x[0], tasks.support)
    phi, none = reference.flat, reference.flat[:0]
    for _ in range(2):
        way = phi - reference.flat
        value, gradient = jax.value_and_grad(reference.loss)(phi, none, support)
        phi = phi - 0.1 * (value + STRENGTH / 2 * way @ way) * (gradient + STRENGTH * way)
    ours = imaml(by_value, 2).inner_adapt(model, support)
    np.testing.assert_allclose(ravel_pytree(ours)[0], phi, rtol=1e-12)


class Complex(eqx.Module):
    w: jax.Array
    fixed: jax.Array

    def __call__(self, x):
        return jnp.abs(jnp.tanh(self.w * x) @ self.fixed)[None]


class Parts(eqx.Module):
    """The same in real numbers."""

    w: tuple[jax.Array, ...]
    fixed: tuple[jax.Array, ...]

    def __call__(self, x):
        return Complex(jax.lax.complex(*self.w), jax.lax.complex(*self.fixed))(x)


@pytest.mark.slow
def test_complex_parameters(x64):
    numbers = np.random.default_rng(0).standard_normal((4, 3))
    w, fixed = (tuple(map(jnp.asarray, numbers[i : i + 2])) for i in (0, 2))
    strategy, tasks = imaml(optax.sgd(0.05), 5, adapt=lambda m: m.w), batch()
    as_parts, expected = strategy.outer_update(strategy.init(Parts(w, fixed)), tasks, key=None)
    model = Complex(jax.lax.complex(*w), jax.lax.complex(*fixed))
    as_complex, metrics = strategy.outer_update(strategy.init(model), tasks, key=None)
    for name in ("w", "fixed"):
        ours, (real, imaginary) = getattr(as_complex.model, name), getattr(as_parts.model, name)
        np.testing.assert_allclose(ours, real + 1j * imaginary, rtol=1e-10)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-10)


@pytest.mark.slow
def test_chunks_of_tasks_change_nothing(x64):
    model, tasks = wide(tiny_mlp()), batch(3)
    whole, expected = meta_gradient(imaml(steps=3, cg_steps=3, task_chunk=None), model, tasks)
    ours, metrics = meta_gradient(imaml(steps=3, cg_steps=3, task_chunk=1), model, tasks)
    np.testing.assert_allclose(ours, whole, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(metrics["cg_residual"], expected["cg_residual"], rtol=1e-10)


@pytest.mark.slow
def test_a_model_that_drops_out_and_one_in_bfloat16():
    class Dropping(eqx.Module):
        body: eqx.nn.MLP
        drop: eqx.nn.Dropout

        def __call__(self, x, *, key=None):
            return self.body(self.drop(x, key=key))

    mlp = eqx.nn.MLP(1, 1, 4, 1, key=KEY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, mlp)
    tasks = jax.vmap(em.tasks.Sinusoid(5, 7).sample)(jax.random.split(KEY, 2))
    for model in (Dropping(mlp, eqx.nn.Dropout(0.5)), half):
        strategy = imaml(steps=2)
        state, metrics = strategy.outer_update(strategy.init(model), tasks, key=KEY)
        assert all(np.isfinite(x) for x in metrics.values())
        assert all(
            new.dtype == old.dtype and not np.array_equal(new, old)
            for new, old in zip(
                *(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (state.model, model)),
                strict=True,
            )
        )


class Lines(eqx.Module):
    """Weights near one, of which few examples tell little."""

    def sample(self, key):
        of_w, of_x = jax.random.split(key)
        w = 1 + 0.1 * jax.random.normal(of_w, (4, 1))
        x = jax.random.normal(of_x, (8, 4))
        return em.Task((x[:3], x[:3] @ w), (x[3:], x[3:] @ w))


def test_it_learns():
    strategy = imaml(optax.sgd(0.1), 5, outer=optax.adam(0.05), strength=1.0, cg_steps=5)
    trainer = em.Trainer(strategy, meta_batch_size=4, summary=False)
    model = eqx.nn.Linear(4, 1, key=KEY)
    state = trainer.fit(model, Lines(), 100)
    before, after = (
        em.evaluate(strategy, m, Lines(), num_tasks=50).mean()[-1] for m in (model, state.model)
    )
    assert after < 0.05 * before


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": float("inf")}, "strength"),
        ({"strength": "1"}, "strength"),
        ({"strength": True}, "strength"),
        ({"cg_steps": 0}, "cg_steps"),
        ({"cg_steps": 2.5}, "cg_steps"),
    ],
)
def test_wrong_arguments_are_named(options, named):
    with pytest.raises((TypeError, ValueError), match=rf"`IMAML\({named}=...\)`" + THREE_PARTS):
        imaml(**options)
