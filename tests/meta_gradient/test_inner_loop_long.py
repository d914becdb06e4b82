"""Long inner loops: the step outside of the loop, and the blocks that are computed again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tiny_mlp, tree_allclose


def float64(tree):
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def adaptation(steps, remat, **options):
    task = em.tasks.Sinusoid(6, 6).sample(jax.random.key(1))
    inner = em.InnerLoop(optax.adam(0.02), steps, remat=remat)
    return inner(
        em.losses.mse,
        float64(tiny_mlp()),
        task.support,
        key=jax.random.key(2),
        observe=lambda model: em.losses.mse(model, task.query, None)[0],
        minibatches=jax.random.randint(jax.random.key(3), (steps, 4), 0, 6),
        **options,
    )


@pytest.mark.parametrize(
    "steps", [1, 5, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 12))]
)
def test_remat_changes_nothing_that_is_computed(steps, x64):
    @eqx.filter_jit
    def all_of_them():
        return [adaptation(steps, remat) for remat in (False, True, 1, 3, 100)]

    plain, *others = all_of_them()
    assert plain.losses.shape == (steps,) and plain.observed.shape == (steps + 1,)
    for other in others:
        assert tree_allclose(other, plain, rtol=1e-12, atol=1e-12)


def test_the_path_is_that_of_optax_step_by_step(x64):
    """Written out: a Python loop over optax, without `InnerLoop`."""
    task = em.tasks.Sinusoid(6, 6).sample(jax.random.key(1))
    params, static = eqx.partition(float64(tiny_mlp()), eqx.is_inexact_array)
    rows = jax.random.randint(jax.random.key(3), (7, 4), 0, 6)
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for i in range(7):
        params, state, value = step(params, state, *(leaf[rows[i]] for leaf in task.support))
        losses.append(value)
    result = eqx.filter_jit(adaptation)(7, 3)
    assert tree_allclose(result.losses, jnp.stack(losses), rtol=1e-10)
    assert tree_allclose(eqx.filter(result.model, eqx.is_inexact_array), params, rtol=1e-10)


def meta_gradient(steps, gradient, remat):
    task = em.tasks.Sinusoid(5, 5).sample(jax.random.key(1))
    params, static = eqx.partition(float64(tiny_mlp()), eqx.is_inexact_array)
    inner = em.InnerLoop(optax.sgd(0.05, momentum=0.5), steps, gradient, remat=remat)
    strategy = em.MAML(em.losses.mse, inner, optax.sgd(1.0))

    def objective(params):
        adapted = strategy.inner_adapt(eqx.combine(params, static), task.support)
        return em.losses.mse(adapted, task.query, None)[0]

    return objective, params


@pytest.mark.parametrize("gradient", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.slow), 6])
def test_the_meta_gradient_is_that_of_finite_differences(gradient, steps, x64):
    for remat in (False, True, 2):
        objective, params = meta_gradient(steps, gradient, remat)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        value = jax.jit(lambda x: objective(unravel(x)))  # noqa: B023
        grads = jax.jit(jax.grad(value))(flat)
        direction = jax.random.normal(jax.random.key(5), flat.shape)
        eps = 1e-6
        slope = value(flat + eps * direction) - value(flat - eps * direction)
        assert jnp.allclose(grads @ direction, slope / (2 * eps), rtol=1e-6)


def step_program(steps, gradient="mixed", remat=False, tasks=4, depth=3):
    inner = em.InnerLoop(optax.sgd(0.01), steps, gradient, remat=remat)
    strategy = em.MAML(em.losses.mse, inner, optax.sgd(0.1), task_chunk=None)
    model = eqx.nn.MLP(1, 1, 64, depth, activation=jax.nn.gelu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = jax.eval_shape(
        lambda k: jax.vmap(em.tasks.Sinusoid(64, 64).sample)(jax.random.split(k, tasks)),
        jax.random.key(0),
    )

    def meta_gradient(params, batch):
        def loss(task):
            adapted = strategy.inner_adapt(eqx.combine(params, static), task.support)
            return em.losses.mse(adapted, task.query, None)[0]

        return jnp.mean(jax.vmap(loss)(batch))

    return jax.grad(meta_gradient), params, batch


def temp_bytes(*args, **options):
    fun, *shapes = step_program(*args, **options)
    return jax.jit(fun).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_remat_takes_less_memory():
    assert temp_bytes(1025, remat=True, depth=1) < temp_bytes(1025, depth=1) / 6


@pytest.mark.slow
def test_memory_grows_with_the_square_root_of_the_steps():
    kept = {steps: temp_bytes(steps, remat=True) for steps in (65, 257, 1025)}
    all_kept = {steps: temp_bytes(steps) for steps in (65, 257, 1025)}
    # Four times the steps: what is added is about twice as much, and without remat four times.
    assert (kept[1025] - kept[257]) < 3 * (kept[257] - kept[65])
    assert (all_kept[1025] - all_kept[257]) > 3.5 * (all_kept[257] - all_kept[65])
    assert kept[1025] < all_kept[1025] / 8


def test_mixed_mode_keeps_no_activations_not_even_of_the_first_step():
    assert temp_bytes(2, depth=1) <= temp_bytes(3, depth=1)
    assert temp_bytes(16, depth=1) < temp_bytes(16, "reverse", depth=1) / 4


def test_with_remat_the_program_does_not_grow_with_the_steps():
    """Without: `test_meta_gradient`."""

    def size(steps):
        fun, *shapes = step_program(steps, remat=True)
        return str(jax.make_jaxpr(fun)(*shapes)).count("\n")

    assert size(10) == pytest.approx(size(401), rel=0.02)


def test_the_first_step_shares_its_forward_pass_across_tasks():
    fun, *shapes = step_program(3)
    text = jax.jit(fun).lower(*shapes).as_text()
    # Weights without a task axis, against the hidden units of all tasks' examples. Three steps
    # with per-task weights would not have it.
    assert "(tensor<4x64x64xf32>, tensor<64x64xf32>)" in text


@pytest.mark.parametrize(("remat", "blocks"), [(3, True), (6, True), (8, True), (9, False)])
def test_a_block_longer_than_half_of_the_loop_is_one_too(remat, blocks):
    fun, *shapes = step_program(10, remat=remat)  # nine of them in the loop
    assert ("remat" in str(jax.make_jaxpr(fun)(*shapes))) == blocks


def test_an_optimizer_that_wants_the_loss_is_given_it():
    """Against optax by itself: a plateau, here every step that is not below half, divides the rate
    by ten."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=1, rtol=0.5, accumulation_size=1)
    optimizer = optax.chain(optax.sgd(0.1), plateau)

    def loss(model, batch, key):
        return jnp.sum(model**2), {}

    model = jnp.array([1.0, -2.0])
    adapted = em.InnerLoop(optimizer, 6)(loss, model, jnp.zeros(1)).model
    state = optimizer.init(model)
    for _ in range(6):
        value, grads = jax.value_and_grad(lambda m: loss(m, None, None)[0])(model)
        updates, state = optimizer.update(grads, state, model, value=value)
        model = optax.apply_updates(model, updates)
    assert tree_allclose(adapted, model, rtol=1e-5)
    assert not np.allclose(model, 0.8**6 * np.array([1.0, -2.0]), rtol=0.1)  # it did reduce


def test_a_line_search_is_refused():
    with pytest.raises(TypeError, match=r"`InnerLoop\(optimizer=...\)`(?s:.*)value_fn") as error:
        em.InnerLoop(optax.lbfgs(), 2)(em.losses.mse, tiny_mlp(), (jnp.ones((2, 1)),) * 2)
    assert "\nReceived: " in str(error.value) and "\nExpected: " in str(error.value)


@pytest.mark.parametrize("value", [0, -2, 1.5, "yes"])
def test_what_is_no_length_of_a_block_is_refused(value, as_users_run_it):
    with pytest.raises((TypeError, ValueError)) as error:
        em.InnerLoop(optax.sgd(0.1), 3, remat=value)
    assert "`InnerLoop(remat=...)`" in str(error.value)
    assert repr(value) in str(error.value)
    assert "inner steps a block, True or False" in str(error.value)
