"""`InnerLoop(window=k)`: only the last k inner gradients are differentiated."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..helpers import tiny_mlp

KEY = jax.random.key(0)
STEPS = 4


def wide(tree):
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def head(model):
    return model.out


OPTIMIZERS = {"sgd": optax.sgd(0.05), "adam": optax.adam(0.02)}


def meta_gradient(optimizer="adam", steps=STEPS, gradient: Any = "mixed", *, call=None, **options):
    """In float64, of one task and the `tiny_mlp`."""
    inner = em.InnerLoop(OPTIMIZERS[optimizer], steps, gradient, **options)
    task = wide(em.tasks.Sinusoid(5, 7).sample(KEY))
    flat, unravel = ravel_pytree(wide(tiny_mlp()))

    def objective(flat):
        adapted = inner(em.losses.mse, unravel(flat), task.support, **(call or {})).model
        return em.losses.mse(adapted, task.query, None)[0]

    return np.asarray(jax.jit(jax.grad(objective))(flat))


def written_out(optimizer, window, steps=STEPS, adapt=None):
    task = wide(em.tasks.Sinusoid(5, 7).sample(KEY))
    flat, unravel = ravel_pytree(wide(tiny_mlp()))

    def loss(fast, model, batch):
        whole = fast if adapt is None else eqx.tree_at(adapt, model, fast)
        x, y = batch
        return jnp.mean((jax.vmap(whole)(x) - y) ** 2)

    def objective(flat):
        model = unravel(flat)
        fast = model if adapt is None else adapt(model)
        state = OPTIMIZERS[optimizer].init(fast)
        for i in range(steps):
            gradient = jax.grad(loss)(fast, model, task.support)
            if i < steps - window:
                gradient = jax.lax.stop_gradient(gradient)
            updates, state = OPTIMIZERS[optimizer].update(gradient, state, fast)
            fast = optax.apply_updates(fast, updates)
        return loss(fast, model, task.query)

    return np.asarray(jax.jit(jax.grad(objective))(flat))


@pytest.mark.parametrize(
    ("window", "optimizer", "options"),
    [
        (2, "adam", {"gradient": "mixed"}),
        (1, "sgd", {"gradient": "mixed", "adapt": head}),
        pytest.param(3, "adam", {"gradient": "reverse"}, marks=pytest.mark.slow),
        pytest.param(2, "adam", {"gradient": "reverse", "adapt": head}, marks=pytest.mark.slow),
        pytest.param(3, "sgd", {"gradient": "mixed", "remat": True}, marks=pytest.mark.slow),
        (3, "sgd", {"gradient": "reverse", "remat": 1}),
    ],
)
def test_it_is_the_truncated_gradient(x64, window, optimizer, options):
    ours = meta_gradient(optimizer, window=window, **options)
    expected = written_out(optimizer, window, adapt=options.get("adapt"))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_truncations_differ(x64):
    """Of each other, so that the test above can fail."""
    found = [written_out("sgd", window) for window in range(STEPS + 1)]
    for a, b in itertools.pairwise(found):
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


@pytest.mark.parametrize(
    ("optimizer", "gradient"),
    [("sgd", "mixed"), pytest.param("adam", "reverse", marks=pytest.mark.slow)],
)
def test_its_ends_are_exact_and_first_order(x64, optimizer, gradient):
    """To the bit: they are the same programs."""
    exact = meta_gradient(optimizer, gradient=gradient)
    assert np.array_equal(meta_gradient(optimizer, gradient=gradient, window=STEPS), exact)
    assert np.array_equal(meta_gradient(optimizer, gradient=gradient, window=STEPS + 3), exact)
    first_order = meta_gradient(optimizer, gradient="first_order")
    assert np.array_equal(meta_gradient(optimizer, gradient=gradient, window=0), first_order)


def test_the_window_is_of_the_steps_of_the_call(x64):
    """Whether there are fewer or more than trained with, and wherever they begin to count."""
    ours = meta_gradient("sgd", window=2, call={"steps": 2})
    np.testing.assert_allclose(ours, written_out("sgd", 2, 2), rtol=1e-9, atol=1e-12)
    ours = meta_gradient("sgd", 1, window=2, call={"steps": 5, "start": 3})
    np.testing.assert_allclose(ours, written_out("sgd", 2, 5), rtol=1e-9, atol=1e-12)


def test_values_do_not_depend_on_it():
    task = em.tasks.Sinusoid(5, 7).sample(KEY)

    @eqx.filter_jit
    def adapted(inner, steps):
        return inner(
            em.losses.mse, tiny_mlp(), task.support, steps=steps, observe=lambda m: m.out.bias
        )

    ends = []
    for window in (None, 0, 2, 5):
        inner = em.InnerLoop(OPTIMIZERS["sgd"], 3, window=window)
        end, none = adapted(inner, 3), adapted(inner, 0)
        assert end.losses.shape == (3,) and end.observed.shape == (4, 1)
        ends.append([*jax.tree.leaves(end.model), end.losses, end.observed])
        assert none.losses.shape == (0,) and eqx.tree_equal(none.model, tiny_mlp())
    for other in ends[1:]:
        for a, b in zip(other, ends[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["mixed", "reverse"])
def test_memory_does_not_grow_with_the_steps_before_the_window(gradient):
    task = em.tasks.Sinusoid(5, 7).sample(KEY)
    flat, unravel = ravel_pytree(tiny_mlp())

    def temp_bytes(steps, window):
        inner = em.InnerLoop(optax.sgd(0.05), steps, gradient, window=window)

        def objective(flat):
            adapted = inner(em.losses.mse, unravel(flat), task.support).model
            return em.losses.mse(adapted, task.query, None)[0]

        compiled = jax.jit(jax.grad(objective)).lower(flat).compile()
        return getattr(compiled.memory_analysis(), "temp_size_in_bytes")  # noqa: B009

    exact = temp_bytes(203, None) - temp_bytes(5, None)
    truncated = temp_bytes(203, 3) - temp_bytes(5, 3)
    assert exact > 0.9 * 198 * flat.size * 4  # the fast weights of every step
    assert truncated < 198 * 4 * 4  # the losses


def test_it_is_a_part_of_what_a_run_is(tmp_path):
    def fit(window):
        inner = em.InnerLoop(optax.sgd(0.05), 2, window=window)
        strategy = em.MAML(em.losses.mse, inner, optax.sgd(0.1))
        checkpoint = Checkpoint(tmp_path, every=1)
        trainer = em.Trainer(strategy, meta_batch_size=1, callbacks=[checkpoint], summary=False)
        trainer.fit(tiny_mlp(), em.tasks.Sinusoid(4, 4), 1, resume="auto")

    fit(1)
    fit(1)
    with pytest.raises(em.CheckpointMismatch, match="window"):
        fit(None)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("window", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_wrong_window_is_named(window, error):
    with pytest.raises(error, match=r"`InnerLoop\(window=...\)`[^\n]+\nReceived: .+\nExpected: .+"):
        em.InnerLoop(optax.sgd(0.1), 2, window=window)
