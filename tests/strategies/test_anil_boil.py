"""ANIL adapts the head, BOIL the rest; against plain JAX, and what counts as the head."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em

from ..helpers import TinyMLP, tiny_mlp, tree_allclose

KEY = jax.random.key(0)
RATE = 0.1
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
both = pytest.mark.parametrize("name", ["ANIL", "BOIL"])


def inner(steps=2, **options):
    return em.InnerLoop(optax.sgd(RATE), steps, **options)


def strategy_of(name, *, inner=inner(), **options):  # noqa: B008
    return getattr(em, name)(em.losses.mse, inner, optax.sgd(1.0), **options)


def task_of() -> em.Task:
    return em.tasks.Sinusoid(4, 6).sample(KEY)


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def adapted_by_hand(name: str, params: dict, support, steps: int) -> dict:
    """Inner descent on a dict of arrays, rate zero for what the paper leaves alone."""
    fast = {"ANIL": {"w2", "b2"}, "BOIL": {"w1", "b1"}}[name]
    for _ in range(steps):
        grads = jax.grad(plain_loss)(params, support)
        params = {k: p - (RATE if k in fast else 0.0) * grads[k] for k, p in params.items()}
    return params


def plain_loss(p: dict, examples) -> jax.Array:
    x, y = examples
    return jnp.mean((jnp.tanh(x @ p["w1"].T + p["b1"][None]) @ p["w2"].T + p["b2"][None] - y) ** 2)


def params_of(model: TinyMLP) -> dict:
    a, b = model.hidden, model.out
    return {"w1": a.weight, "b1": a.bias, "w2": b.weight, "b2": b.bias}


@both
def test_the_outer_step_is_that_of_plain_jax(name, x64):
    model, task = jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, (tiny_mlp(), task_of())
    )
    params = params_of(model)
    strategy = strategy_of(name)  # `out` is the last Linear
    adapted = strategy.inner_adapt(model, task.support)
    assert type(adapted) is TinyMLP
    assert tree_allclose(params_of(adapted), adapted_by_hand(name, params, task.support, 2))

    def meta_loss(params):
        return plain_loss(adapted_by_hand(name, params, task.support, 2), task.query)

    state, metrics = strategy.outer_update(
        strategy.init(model), jax.tree.map(lambda x: x[None], task), key=None
    )
    loss, grads = jax.jit(jax.value_and_grad(meta_loss))(params)
    assert tree_allclose(metrics["loss"], loss, rtol=1e-10)
    descended = jax.tree.map(lambda p, q: p - q, params, params_of(state.model))
    assert tree_allclose(descended, grads, rtol=1e-9, atol=1e-12)


def test_what_the_head_is():
    class Net(eqx.Module):
        head: eqx.nn.Linear
        body: eqx.nn.Linear

        def __call__(self, x):
            return self.head(jnp.tanh(self.body(x)))

    net = Net(eqx.nn.Linear(8, 1, key=KEY), eqx.nn.Linear(1, 8, key=KEY))
    support = task_of().support

    def moved(model, **options):
        adapted = strategy_of("ANIL", **options).inner_adapt(model, support)
        same = jax.tree.map(lambda p, q: bool(jnp.all(p == q)), model, adapted)
        return [
            jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(same) if not v
        ]

    # The field of that name, else the last Linear, unless the user says.
    assert moved(net) == [".head.weight", ".head.bias"]
    assert moved(tiny_mlp()) == [".out.weight", ".out.bias"]
    assert moved(tiny_mlp(), head=lambda m: m.out.bias) == [".out.bias"]


class HeadMethod(eqx.Module):
    """`head` is a method: bound, it is a tree that holds the whole model."""

    body: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self):
        self.body = eqx.nn.Linear(1, 8, key=KEY)
        self.last = eqx.nn.Linear(8, 1, key=KEY)

    def head(self, features):
        return self.last(features)

    @eqx.filter_jit
    def compiled(self, features):
        return self.head(features)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


class HeadProperty(HeadMethod):
    @property
    def head(self):
        return self.last


@pytest.mark.parametrize("model", [HeadMethod(), HeadProperty()], ids=["method", "property"])
def test_a_method_is_not_a_head_and_a_property_is(model):
    support = task_of().support
    for name in ("ANIL", "BOIL"):
        adapted = strategy_of(name).inner_adapt(model, support)
        moved = jax.tree.leaves(jax.tree.map(lambda p, q: bool(jnp.any(p != q)), model, adapted))
        assert moved == ([False] * 2 + [True] * 2 if name == "ANIL" else [True] * 2 + [False] * 2)


@pytest.mark.parametrize("where", [lambda m: m.head, lambda m: (m.body, m.compiled)])
def test_a_method_is_refused_where_a_part_is_meant(where):
    maml = em.MAML(em.losses.mse, inner(adapt=where), optax.sgd(1.0))
    for argument, strategy in (
        ("ANIL(head=...)", strategy_of("ANIL", head=where)),
        ("BOIL(head=...)", strategy_of("BOIL", head=where)),
        ("InnerLoop(adapt=...)", maml),
    ):
        with pytest.raises(ValueError, match="returned a method" + THREE_PARTS) as caught:
            strategy.inner_adapt(HeadMethod(), task_of().support)
        assert argument in str(caught.value)


class NoLinear(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return self.weight * x


@both
def test_a_model_without_a_head_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}\(head=...\)` is needed" + THREE_PARTS):
        strategy_of(name).inner_adapt(NoLinear(jnp.ones(1)), task_of().support)


def test_nothing_but_a_head_leaves_no_body():
    for options in ({}, {"head": lambda m: m}):
        message = r"`BOIL\(head=...\)` leaves nothing that adapts" + THREE_PARTS
        with pytest.raises(ValueError, match=message):
            strategy_of("BOIL", **options).inner_adapt(
                eqx.nn.Linear(1, 1, key=KEY), task_of().support
            )


@both
def test_a_head_that_is_none_is_told_of_by_its_argument(name):
    model = em.nn.Conv4(1, ways=None, size=16, width=2, key=KEY)
    with pytest.raises(ValueError, match=rf"`{name}\(head=...\)` chooses nothing" + THREE_PARTS):
        strategy_of(name).inner_adapt(model, (jnp.ones((2, 1, 16, 16)), jnp.ones((2, 2))))


@pytest.mark.usefixtures("as_users_run_it")
@both
def test_wrong_arguments_are_named(name):
    with pytest.raises(ValueError, match=rf"`{name}\(inner=...\)`" + THREE_PARTS):
        strategy_of(name, inner=inner(adapt=lambda m: m.out))
    for head in ("head", eqx.nn.Linear, tiny_mlp().out):
        with pytest.raises(TypeError, match=rf"`{name}\(head=...\)`" + THREE_PARTS):
            strategy_of(name, head=head)
    with pytest.raises(TypeError, match=rf"`{name}\(inner=...\)`" + THREE_PARTS):
        strategy_of(name, inner=optax.sgd(0.1))


def test_the_number_of_inner_steps_is_the_evaluations():
    tasks = em.tasks.Sinusoid(4, 6)
    strategy = strategy_of("ANIL")
    result = em.evaluate(strategy, tiny_mlp(), tasks, num_tasks=4, inner_steps=3)
    same = em.MAML(em.losses.mse, inner(adapt=lambda m: m.out), optax.sgd(1.0))
    expected = em.evaluate(same, tiny_mlp(), tasks, num_tasks=4, inner_steps=3)
    assert result.values["loss"].shape == (4, 4)
    assert tree_allclose(result.mean(), expected.mean(), rtol=1e-5)
