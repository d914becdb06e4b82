"""Tasks a few at a time: the same outer step, in memory that goes with the chunk."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta._task import layout as _task_chunk

from ..helpers import tiny_mlp, tree_allclose


class Noisy(eqx.Module):
    """Its output depends on the key, as with dropout."""

    network: eqx.Module

    def __call__(self, x, key=None):
        noise = 0.0 if key is None else 0.1 * jax.random.normal(key, x.shape, x.dtype)
        return self.network(x + noise)


class OneStep(em.GradientStrategy):
    """A user's own strategy: it has the knob without a word of its own."""

    loss: em.Loss
    optimizer: optax.GradientTransformation
    rate: float = 0.1

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        grads = eqx.filter_grad(lambda m: self.loss(m, support, key)[0])(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -self.rate * g, grads))


def built_in(cls, **options):
    def make(task_chunk):
        inner = em.InnerLoop(optax.adam(0.01), 2)
        return cls(em.losses.mse, inner, optax.adam(1e-2), task_chunk=task_chunk, **options)

    return make


MAKERS = {
    "MAML": built_in(em.MAML),
    "FOMAML": built_in(em.FOMAML),
    "Joint": built_in(em.Joint),
    "Reptile": built_in(em.Reptile, batch_size=2, inner_state="carry"),
    "OneStep": lambda task_chunk: OneStep(
        em.losses.mse, optax.adam(1e-2), rate=0.2, task_chunk=task_chunk
    ),
}


# Of 6 tasks: 4 does not divide them, 7 is more than there are.
QUICK = [("OneStep", 4)]
LONG = [(name, chunk) for name in MAKERS for chunk in (1, 4, 7) if (name, chunk) not in QUICK]


@pytest.mark.parametrize(
    ("name", "chunk"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]
)
def test_the_outer_step_is_the_same_to_rounding(name, chunk, x64):
    source = em.tasks.Sinusoid(3, 4)
    tasks = jax.vmap(source.sample)(jax.random.split(jax.random.key(1), 6))
    model = Noisy(jax.tree.map(lambda x: x.astype(float), tiny_mlp(), is_leaf=eqx.is_array))

    def step(task_chunk):
        strategy = MAKERS[name](task_chunk)
        return strategy.outer_update(strategy.init(model), tasks, key=jax.random.key(2))

    state, metrics = step(None)
    other, others = step(chunk)
    assert tree_allclose(other, state, rtol=1e-9, atol=1e-12)
    assert tree_allclose(others, metrics, rtol=1e-9, atol=1e-12)


def temp_bytes(task_chunk, tasks, width=64, points=256):
    inner = em.InnerLoop(optax.sgd(0.01), 2)
    strategy = em.MAML(em.losses.mse, inner, optax.sgd(0.1), task_chunk=task_chunk)
    state = strategy.init(eqx.nn.MLP(1, 1, width, 2, key=jax.random.key(0)))
    batch = jax.eval_shape(
        lambda k: jax.vmap(em.tasks.Sinusoid(points, points).sample)(jax.random.split(k, tasks)),
        jax.random.key(0),
    )
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(dynamic, batch):
        new, _ = strategy.outer_update(eqx.combine(dynamic, static), batch, key=None)
        return eqx.filter(new, eqx.is_array)

    compiled = jax.jit(step).lower(dynamic, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_goes_with_the_chunk_and_not_with_the_tasks():
    one = temp_bytes(1, tasks=8)
    assert one < temp_bytes(None, tasks=8) / 5
    assert 1.5 < temp_bytes(2, tasks=8) / one < 2.5
    # A scan that is differentiated would keep something of every task. What does grow is a copy of
    # the tasks themselves: 256 x and y for support and query.
    assert temp_bytes(1, tasks=64) < 1.1 * one + 56 * 4 * 256 * 4


@pytest.mark.slow
def test_auto_is_all_at_once_for_a_small_model_and_one_by_one_for_a_large_one():
    assert temp_bytes("auto", 4) == temp_bytes(None, 4)
    assert temp_bytes("auto", 4, width=256, points=512) == temp_bytes(1, 4, width=256, points=512)


@pytest.mark.parametrize(("tasks", "comes_to"), [(1, None), (4, 1)])
def test_auto_traces_no_more_often_than_what_it_comes_to(tasks, comes_to, monkeypatch):
    monkeypatch.setattr(_task_chunk, "_LARGE_TASK", 0)
    source = em.tasks.Sinusoid(2, 2)
    batch = jax.vmap(source.sample)(jax.random.split(jax.random.key(1), tasks))

    def traces(task_chunk):
        calls = []

        def loss(model, batch, key):
            calls.append(1)
            return em.losses.mse(model, batch, key)

        strategy = OneStep(loss, optax.sgd(0.1), task_chunk=task_chunk)
        jax.eval_shape(lambda: strategy.outer_update(strategy.init(tiny_mlp()), batch, key=None)[1])
        return len(calls)

    assert traces("auto") == traces(comes_to)


def test_half_precision_sums_are_made_in_single_precision():
    source = em.tasks.Sinusoid(4, 4)
    tasks = jax.vmap(source.sample)(jax.random.split(jax.random.key(1), 64))

    def gradient(dtype, task_chunk):
        model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, tiny_mlp())
        # A rate of one: what the outer step subtracts is the meta-gradient.
        strategy = em.Joint(
            em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.sgd(1.0), task_chunk=task_chunk
        )
        state = strategy.init(model)
        new, _ = strategy.outer_update(state, tasks, key=None)
        weight = new.model.hidden.weight
        assert weight.dtype == dtype
        return (state.model.hidden.weight - weight).astype(jnp.float32)

    exact = gradient(jnp.float32, None)
    error = {c: jnp.linalg.norm(gradient(jnp.bfloat16, c) - exact) for c in (None, 1)}
    assert error[1] < 1.5 * error[None] + 1e-3 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_number_of_tasks_is_refused(name, value, as_users_run_it):
    with pytest.raises((TypeError, ValueError)) as error:
        MAKERS[name](value)
    assert f"`{name}(task_chunk=...)`" in str(error.value)
    assert repr(value) in str(error.value)
    assert "1 or more tasks at a time, None (all) or 'auto'" in str(error.value)
