"""What a model may be made of, and what becomes of each kind of leaf."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta._task.device_source import Sampled

from ..boring import BoringTasks
from ..helpers import TinyMLP, tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
STRATEGIES = {
    "MAML": em.MAML,
    "FOMAML": em.FOMAML,
    "Joint": em.Joint,
    "Reptile": lambda *args: em.Reptile(*args, inner_state="carry"),
}
each_strategy = pytest.mark.parametrize("name", STRATEGIES)
# Of the four, two whose outer updates have nothing in common.
two_strategies = pytest.mark.parametrize(
    "name", ["MAML", pytest.param("Reptile", marks=pytest.mark.slow)]
)


def strategy_of(name: str, *, inner=None, outer=None, steps: int = 2, loss=MSE) -> em.Strategy:
    inner, outer = inner or optax.sgd(0.1), outer or optax.sgd(0.1)
    return STRATEGIES[name](loss, em.InnerLoop(inner, steps), outer)


def sine_tasks(num_tasks: int = 2, seed: int = 0) -> em.Task:
    source = em.tasks.Sinusoid(4, 6)
    return jax.vmap(source.sample)(jax.random.split(jax.random.key(seed), num_tasks))


def one_task() -> em.Task:
    return jax.tree.map(lambda x: x[0], sine_tasks())


def updated(strategy: em.Strategy, model: Any, *, key=KEY, times: int = 1, tasks=None):
    """The state after some updates, and the last metrics."""
    state, metrics = strategy.init(model), {}
    for _ in range(times):
        state, metrics = strategy.outer_update(state, tasks or sine_tasks(), key=key)
    assert all(np.isfinite(value) for value in metrics.values())
    return state, metrics


def layout(tree: Any) -> list[tuple]:
    """Dtype, shape and weakness of every array; also of those of `eqx.filter_eval_shape`."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return [(x.dtype, x.shape, getattr(x, "weak_type", False)) for x in leaves]


def update_layout(strategy: em.Strategy, model: Any, tasks: em.Task | None = None):
    """Layouts of the state before and after an update, of the metrics, and of `inner_adapt`'s
    model: traced, not compiled."""
    state, tasks = strategy.init(model), tasks or sine_tasks()
    after, metrics = eqx.filter_eval_shape(
        lambda s, t, k: strategy.outer_update(s, t, key=k), state, tasks, KEY
    )
    support = jax.tree.map(lambda x: x[0], tasks.support)
    adapted = eqx.filter_eval_shape(strategy.inner_adapt, model, support)
    return layout(state), layout(after), metrics, layout(adapted)


# Randomness.


class Dropping(eqx.Module):
    body: TinyMLP
    dropout: eqx.nn.Dropout

    def __init__(self, p: float = 0.5):
        self.body = tiny_mlp()
        self.dropout = eqx.nn.Dropout(p)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        hidden = jax.nn.tanh(self.body.hidden(x))
        return self.body.out(self.dropout(hidden, key=key))


@two_strategies
def test_dropout_is_drawn_from_the_key(name):
    strategy, model = strategy_of(name), Dropping()
    first, again, other = (
        updated(strategy, model, key=jax.random.key(seed))[0].model for seed in (0, 0, 1)
    )
    assert tree_allclose(first, again, rtol=0, atol=0)
    assert not tree_allclose(first, other)


def test_dropout_differs_between_inner_steps_tasks_and_examples():
    """With `p = 1/2` on an input of ones, the loss of a batch of one tells the mask's sum."""

    class Mask(eqx.Module):
        w: Array
        dropout: eqx.nn.Dropout

        def __call__(self, x, *, key=None):
            return self.dropout(self.w, key=key).sum()[None]

    model = Mask(jax.random.normal(KEY, (100,)), eqx.nn.Dropout(0.5))

    def loss(model, batch, key):
        value, _ = MSE(model, (jnp.zeros((1, 1)), jnp.zeros((1, 1))), key)
        return value, {}

    loop = em.InnerLoop(optax.set_to_zero(), 4)
    losses = loop(loss, model, jnp.zeros((1, 1)), key=KEY).losses
    assert len(np.unique(losses)) == 4
    # Tasks that are the same get keys that are not.
    strategy = em.MAML(loss, loop, optax.sgd(0.0))
    tasks = em.Task(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    _, metrics = updated(strategy, model, tasks=tasks)
    _, alone = updated(strategy, model, tasks=jax.tree.map(lambda x: x[:1], tasks))
    assert float(metrics["support_loss/0"]) != float(alone["support_loss/0"])
    predictions = em.losses.predict(model, jnp.zeros((5, 1)), KEY)
    assert len(np.unique(predictions)) == 5


@two_strategies
def test_without_a_key_dropout_wants_inference_mode(name):
    """There is no silent deterministic dropout: Equinox's own error comes through."""
    strategy, task = strategy_of(name), one_task()
    with pytest.raises(RuntimeError, match="Dropout requires a key"):
        strategy.inner_adapt(Dropping(), task.support)
    quiet = eqx.nn.inference_mode(Dropping())
    adapted = strategy.inner_adapt(quiet, task.support)
    # Inference mode is a matter of the model, not of the key.
    assert tree_allclose(adapted, strategy.inner_adapt(quiet, task.support, key=KEY), rtol=1e-6)
    state, _ = strategy.outer_update(strategy.init(quiet), sine_tasks(), key=None)
    assert state.model.dropout.inference


def test_evaluation_predicts_without_dropout_and_leaves_the_model_in_training_mode():
    strategy, model = strategy_of("MAML"), Dropping()
    tasks = sine_tasks(3)
    result = em.evaluate(strategy, model, tasks, inner_steps=1)
    for i in range(3):
        query = jax.tree.map(lambda x, i=i: x[i], tasks.query)
        expected = MSE(eqx.nn.inference_mode(model), query, None)[0]
        np.testing.assert_allclose(result.values["loss"][i, 0], expected, rtol=1e-5)
    assert not model.dropout.inference


# Leaves that are shared, frozen, or no parameters.


class Tied(eqx.Module):
    """The output weight is the input weight, transposed."""

    shared: eqx.nn.Shared

    def __init__(self):
        into = eqx.nn.Linear(1, 8, use_bias=False, key=KEY)
        out = eqx.nn.Linear(8, 1, use_bias=False, key=KEY)

        def get(pair):
            return jnp.transpose(pair[0].weight)

        self.shared = eqx.nn.Shared((into, out), lambda pair: pair[1].weight, get)

    def __call__(self, x: Array) -> Array:
        into, out = self.shared()
        return out(jnp.tanh(into(x)))


@two_strategies
def test_shared_leaves_stay_shared(name):
    state, _ = updated(strategy_of(name), Tied())
    into, out = state.model.shared()
    np.testing.assert_array_equal(into.weight.T, out.weight)
    assert not np.allclose(into.weight, Tied().shared()[0].weight)
    assert sum(x.size for x in jax.tree.leaves(eqx.filter(state.model, eqx.is_array))) == 8

    # As if written with one weight.
    class ByHand(eqx.Module):
        w: Array

        def __call__(self, x):
            return self.w.T @ jnp.tanh(self.w @ x)

    by_hand, _ = updated(strategy_of(name), ByHand(Tied().shared()[0].weight))
    np.testing.assert_allclose(by_hand.model.w, into.weight, rtol=1e-5)


@two_strategies
def test_leaves_stopped_inside_the_model_never_move(name):
    class Frozen(eqx.Module):
        body: TinyMLP

        def __call__(self, x):
            hidden = jax.lax.stop_gradient(self.body.hidden)
            return self.body.out(jax.nn.tanh(hidden(x)))

    strategy, model = (
        strategy_of(name, inner=optax.adam(0.1), outer=optax.sgd(0.1)),
        Frozen(tiny_mlp()),
    )
    adapted = strategy.inner_adapt(model, one_task().support)
    state, _ = updated(strategy, model)
    for new in (adapted, state.model):
        assert tree_allclose(new.body.hidden, model.body.hidden, rtol=0, atol=0)
        assert not tree_allclose(new.body.out, model.body.out)


def labels(model: TinyMLP) -> TinyMLP:
    """`optax.partition`'s labels: the hidden layer is held, the last one learns."""
    model = eqx.filter(model, eqx.is_inexact_array)
    held = jax.tree.map(lambda _: "hold", model)
    return eqx.tree_at(lambda m: m.out, held, jax.tree.map(lambda _: "learn", model.out))


def held_hidden(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.partition({"learn": optimizer, "hold": optax.set_to_zero()}, labels)


def held_by_mask(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def is_held(model):
        return jax.tree.map(lambda label: label == "hold", labels(model))

    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), is_held))


@pytest.mark.parametrize(
    ("name", "hold"),
    [
        ("MAML", held_hidden),
        ("Joint", held_hidden),
        ("Reptile", held_hidden),
        ("FOMAML", held_by_mask),
    ],
)
def test_leaves_held_by_both_optimizers_never_move(name, hold):
    strategy = strategy_of(name, inner=hold(optax.adam(0.1)), outer=hold(optax.sgd(0.1)))
    model = tiny_mlp()
    adapted = strategy.inner_adapt(model, one_task().support)
    state, _ = updated(strategy, model)
    for new in (adapted, state.model):
        assert tree_allclose(new.hidden, model.hidden, rtol=0, atol=0)
        assert not tree_allclose(new.out, model.out)


def test_leaves_held_by_the_inner_optimizer_alone_are_meta_learnt():
    strategy = strategy_of("FOMAML", inner=held_hidden(optax.sgd(0.1)))
    model = tiny_mlp()
    adapted = strategy.inner_adapt(model, one_task().support)
    assert tree_allclose(adapted.hidden, model.hidden, rtol=0, atol=0)
    state, _ = updated(strategy, model)
    assert not tree_allclose(state.model.hidden, model.hidden)


class Mixed(eqx.Module):
    """One of every kind of leaf."""

    w: Any
    count: Array
    mask: Array
    table: np.ndarray
    key: Array
    activation: Callable
    name: str
    nothing: None
    factor: float
    nested: dict[str, Any]

    def __call__(self, x: Array) -> Array:
        scale = jnp.where(self.mask, self.nested["scale"], 0.0).sum() * self.factor
        return self.activation(self.w * x) * scale + self.count[1].astype(x.dtype)


def mixed_model(w: Any = None) -> Mixed:
    return Mixed(
        w=jnp.full(1, 0.5) if w is None else w,
        count=jnp.arange(3),
        mask=jnp.array([True, False]),
        table=np.arange(4, dtype=np.int16),
        key=jax.random.key(3),
        activation=jax.nn.tanh,
        name="mixed",
        nothing=None,
        factor=2.0,
        nested={"scale": jnp.ones(2), "empty": (), "text": ["a", b"b"]},
    )


@each_strategy
def test_other_leaves_are_left_alone(name):
    model = mixed_model()
    strategy = strategy_of(name, inner=optax.adam(0.1))
    state, _ = updated(strategy, model, times=2)
    for new in (state.model, strategy.inner_adapt(model, one_task().support)):
        assert jax.tree.structure(new) == jax.tree.structure(model)
        assert not np.allclose(new.w, model.w)
        # `scale[1]` is masked: it is a parameter without a gradient.
        assert new.nested["scale"][0] != 1 and new.nested["scale"][1] == 1
        np.testing.assert_array_equal(new.count, model.count)
        np.testing.assert_array_equal(new.mask, model.mask)
        np.testing.assert_array_equal(new.table, model.table)
        assert new.table.dtype == np.int16
        assert new.key == model.key
        assert new.activation is jax.nn.tanh
        assert (new.name, new.nothing, new.factor) == ("mixed", None, 2.0)
        assert (new.nested["empty"], new.nested["text"]) == ((), ["a", b"b"])
    assert type(model.table) is np.ndarray


@two_strategies
def test_parameters_of_other_kinds_of_array(name):
    weak = jnp.asarray(0.5)[None]
    assert weak.weak_type
    strategy = strategy_of(name, inner=optax.adam(0.1))
    usual, _ = updated(strategy, mixed_model())
    adapted = strategy.inner_adapt(mixed_model(), one_task().support)
    for w in (np.full(1, 0.5, np.float32), weak, np.float32(0.5)):
        model = mixed_model(w)
        state, _ = updated(strategy, model)
        assert layout(strategy.init(model)) == layout(state)
        assert isinstance(state.model.w, jax.Array) and not state.model.w.weak_type
        np.testing.assert_allclose(np.reshape(state.model.w, 1), usual.model.w, rtol=1e-6)
        # A model that `init` has not seen adapts as well.
        ours = strategy.inner_adapt(model, one_task().support)
        np.testing.assert_allclose(np.reshape(ours.w, 1), adapted.w, rtol=1e-6)


@two_strategies
def test_scalar_parameters_and_models_that_are_no_modules(name):
    """Any pytree is a model, given a loss that can use it."""

    def loss(model, batch, key):
        return jnp.mean((model["a"] * batch["x"] + model["b"][0] - batch["y"]) ** 2), {}

    model = {"a": jnp.array(0.5), "b": (jnp.array(0.1), "unused")}
    (x, y), (query_x, query_y) = sine_tasks().support, sine_tasks().query
    tasks = em.Task({"x": x, "y": y}, {"x": query_x, "y": query_y})
    strategy = strategy_of(name, loss=loss)
    state, _ = updated(strategy, model, tasks=tasks)
    assert state.model["b"][1] == "unused"
    assert state.model["a"].shape == () and float(state.model["a"]) != 0.5
    result = em.evaluate(strategy, state.model, tasks)
    assert result.values["loss"].shape == (2, 3)

    bare = strategy_of(
        name, loss=lambda w, batch, key: (jnp.mean((w * batch[0] - batch[1]) ** 2), {})
    )
    state, _ = updated(bare, jnp.array(0.5))
    assert state.model.shape == () and float(state.model) != 0.5


@two_strategies
def test_one_array_in_two_places_is_two_parameters(name):
    class Affine(eqx.Module):
        a: Array
        b: Array

        def __call__(self, x):
            return self.a * x + self.b

    once = jnp.ones(1)
    state, _ = updated(strategy_of(name), Affine(once, once))
    assert not np.allclose(state.model.a, state.model.b)
    # Not given away twice to the compiled loop either, which consumes its arguments.
    trainer = em.Trainer(strategy_of(name), meta_batch_size=2, summary=False)
    model = Affine(once, once)
    with pytest.warns(RuntimeWarning, match="one array in several places"):
        trained = trainer.fit(model, em.tasks.Sinusoid(4, 4), steps=2).model
    assert not np.allclose(trained.a, trained.b)
    assert float(once[0]) == 1.0


# Half precision.

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "adam": optax.adam(0.01),
    "momentum, schedule": optax.sgd(optax.linear_schedule(0.05, 0.0, 10), momentum=0.9),
    "adamw, schedule": optax.adamw(optax.cosine_decay_schedule(0.01, 10)),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
}


def half(model: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pair if "FOMAML" in pair or "clip" in pair else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(STRATEGIES, OPTIMIZERS)
    ],
)
def test_bfloat16_keeps_its_dtype(name, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    strategy = strategy_of(name, inner=optimizer, outer=optimizer)
    before, after, metrics, adapted = update_layout(strategy, half(tiny_mlp()))
    # The whole state: otherwise the second update would be another program.
    assert before == after
    losses = {metric.dtype for name, metric in metrics.items() if "loss" in name}
    assert losses == {jnp.dtype(jnp.float32)}
    assert {dtype for dtype, *_ in adapted} == {jnp.dtype(jnp.bfloat16)}


@two_strategies
def test_bfloat16_learns(name):
    strategy = strategy_of(name, inner=OPTIMIZERS["momentum, schedule"], outer=optax.adam(0.02))
    state, _ = updated(strategy, half(tiny_mlp()), times=3)
    for new, old in zip(
        jax.tree.leaves(state.model), jax.tree.leaves(half(tiny_mlp())), strict=True
    ):
        assert new.dtype == jnp.bfloat16
        # What moves by less than half a unit of the last place, of eight bits, does not move.
        assert np.mean(np.asarray(new) != np.asarray(old)) > 0.5


@pytest.mark.usefixtures("strict_dtypes")
@each_strategy
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_promotion_of_dtypes_is_implied(name, dtype):
    model, tasks = jax.tree.map(lambda x: x.astype(dtype), (tiny_mlp(), sine_tasks()))
    before, after, *_ = update_layout(strategy_of(name), model, tasks)
    assert before == after


@each_strategy
def test_parameters_of_different_widths(x64, name):
    model = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_mlp())
    model = eqx.tree_at(lambda m: m.hidden, model, half(model.hidden))
    model = eqx.tree_at(lambda m: m.out.bias, model, replace_fn=lambda x: x.astype(jnp.float32))
    strategy = strategy_of(name, inner=optax.adam(0.1), outer=optax.adam(0.1))
    before, after, _, adapted = update_layout(strategy, model)
    assert before == after
    assert adapted == layout(model)


# Models that are refused.


class Normed(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.linear = eqx.nn.Linear(1, 1, key=KEY)
        self.norm = eqx.nn.BatchNorm(1, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        x, state = self.norm(self.linear(x), state)
        return x, state


def with_batch_norm():
    return Normed()


def with_state():
    return eqx.nn.make_with_state(Normed)()


def with_spectral_norm():
    return eqx.nn.Sequential([eqx.nn.SpectralNorm(eqx.nn.Linear(1, 1, key=KEY), "weight", key=KEY)])


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("make", [with_batch_norm, with_state, with_spectral_norm])
def test_models_with_state_are_refused_before_anything_is_compiled(make, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("something was traced")

    strategy = strategy_of("MAML", loss=never)
    source = em.tasks.Sinusoid(2, 2)
    monkeypatch.setattr(em.tasks.Sinusoid, "sample", never)
    model = make()
    said = (
        r"has layers with state(?s:.*)\nReceived: state at model(?s:.*)\nExpected: a model without"
    )
    trainer = em.Trainer(strategy, meta_batch_size=2)
    x = jnp.ones((2, 2, 1))
    batch = em.Task((x, x), (x, x))
    state = em.TrainState(jnp.int32(0), model, ())
    doors = {
        r"fit\(model=": lambda: trainer.fit(model, source, steps=2),
        r"plan\(model=": lambda: trainer.plan(model, source),
        r"fit_seeds\(model=": lambda: em.fit_seeds(trainer, model, source, 2, seeds=2),
        r"evaluate\(model=": lambda: em.evaluate(strategy, model, source),
        r"check_meta_gradient\(model=": lambda: em.check_meta_gradient(strategy, model, batch),
        r"outer_update\(state, ": lambda: strategy.outer_update(state, batch, key=KEY),
        r"inner_adapt\(model, ": lambda: strategy.inner_adapt(model, (x[0], x[0])),
        r"predict\(model, ": lambda: em.losses.predict(model, x[0]),
    }
    for door, enter in doors.items():
        with pytest.raises(ValueError, match=rf"`{door}\.\.\.\)(\[0\])?` {said}") as caught:
            enter()
        assert "for `eqx.nn.SpectralNorm` `eqx.nn.WeightNorm`" in str(caught.value)


def test_weight_norm_is_a_way_out():
    """The layer that is named: it is what its paper says, and one step of a run has the gradient of
    that formula."""
    linear = eqx.nn.Linear(3, 1, key=KEY)
    model = eqx.nn.WeightNorm(linear, "weight")

    def formula(params, x):  # Salimans and Kingma 2016, equation 2
        g, v, bias = params
        return x @ (g * v / jnp.linalg.norm(v, axis=1, keepdims=True)).T + bias[None]

    def loss(params, x, y):
        return jnp.mean((formula(params, x) - y) ** 2)

    def after_a_step(params, support):
        return jax.tree.map(lambda p, d: p - 0.1 * d, params, jax.grad(loss)(params, *support))

    params = model.g, model.layer.weight, model.layer.bias
    task = jax.tree.map(lambda x: x[0], Sampled(BoringTasks(), 1).first(jax.random.fold_in(
        jax.random.key(0), 0)))  # fmt: skip
    meta_gradient = jax.grad(lambda p: loss(after_a_step(p, task.support), *task.query))
    meta = jax.jit(meta_gradient)(params)
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps=1), optax.sgd(0.1))
    trainer = em.Trainer(strategy, meta_batch_size=1, summary=False)
    learnt = trainer.fit(model, BoringTasks(), 1).model
    learnt = learnt.g, learnt.layer.weight, learnt.layer.bias
    expected = jax.tree.map(lambda p, d: p - 0.1 * d, params, meta)
    assert tree_allclose(learnt, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (TinyMLP, TypeError, "the class"),
        (eqx.nn.Identity(), ValueError, "no parameters"),
        ({"steps": jnp.arange(3)}, ValueError, "no parameters"),
    ],
)
def test_what_has_nothing_to_learn_is_refused(model, error, said):
    trainer = em.Trainer(strategy_of("MAML"), meta_batch_size=2)
    with pytest.raises(error, match=rf"(?s){said}.*\nExpected: "):
        trainer.fit(model, em.tasks.Sinusoid(2, 2), steps=2)


# The Trainer.


@two_strategies
def test_fit_leaves_the_model_as_it_is(name):
    model = mixed_model(np.full(1, 0.5, np.float32))
    before = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, model)
    trainer = em.Trainer(strategy_of(name), meta_batch_size=2, summary=False)
    first = trainer.fit(model, em.tasks.Sinusoid(4, 4), steps=2).model
    assert tree_allclose(model, before, rtol=0, atol=0)
    assert type(model.table) is np.ndarray
    # And it may be used again, for a run that is the same.
    second = trainer.fit(model, em.tasks.Sinusoid(4, 4), steps=2).model
    assert tree_allclose(first, second, rtol=0, atol=0)
    assert not np.allclose(first.w, model.w)
    assert first.activation is jax.nn.tanh and first.name == "mixed"
