"""What holds for every strategy, in one small program: 3-way classification in a plane, 4 tasks an
outer step, 3 steps, a few hundred parameters.

A new strategy is found by its public name. One that is not made by `Name(loss, inner, optimizer)`
needs a line in `MADE`, one that trains another model a line in `MODELS`, one that trains on other
tasks than it adapts to a line in `SOURCES`.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Evaluate

from ..boring import same_bits
from ..helpers import tree_allclose

ROOT = Path(__file__).parent.parent.parent
KEY = jax.random.key(0)
BASES = em.Strategy, em.GradientStrategy, em.RolloutStrategy


class Net(eqx.Module):
    """`[2] -> [3]`, 195 parameters."""

    layers: list[eqx.nn.Linear]

    def __init__(self):
        keys = jax.random.split(KEY)
        self.layers = [eqx.nn.Linear(2, 32, key=keys[0]), eqx.nn.Linear(32, 3, key=keys[1])]

    def __call__(self, x):
        first, last = self.layers
        return last(jnp.tanh(first(x)))


class Blobs(eqx.Module):
    """Three clouds of points, 2 shots and 4 queries of each: elsewhere in each task, but so that
    what does not adapt has something to learn too."""

    def sample(self, key):
        where, noise = jax.random.split(key)
        usual = jnp.array([[[-1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
        x = usual + 0.7 * jax.random.normal(where, (3, 1, 2))
        x = x + 0.3 * jax.random.normal(noise, (3, 6, 2))
        y = jnp.broadcast_to(jnp.arange(3)[:, None], (3, 6))
        support, query = slice(2), slice(2, 6)
        return em.Task(*((x[:, s].reshape(-1, 2), y[:, s].ravel()) for s in (support, query)))


class Batches(eqx.Module):
    """The same points without tasks."""

    def sample(self, key):
        return em.Task((), Blobs().sample(key).pooled)


def of_docs(name: str) -> type:
    """The class as it stands there."""
    text = (ROOT / "docs/strategies.md").read_text()
    (code,) = re.findall(rf"(?<=```python\n)class {name}\(.*?(?=\n\n\n|\n```)", text, re.DOTALL)
    namespace = {"em": em, "eqx": eqx, "jax": jax, "optax": optax, "__name__": "docs"}
    exec(compile(code, "strategies.md", "exec"), namespace)
    return namespace[name]


def of_example(name: str) -> type:
    spec = importlib.util.spec_from_file_location("own", ROOT / "examples/custom_strategy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


CLASSES = {
    name: value
    for name, value in vars(em).items()
    if isinstance(value, type) and issubclass(value, em.Strategy) and value not in BASES
}
CLASSES |= {f"{name} of the docs": of_docs(name) for name in ("LastLayerMAML", "Towards")}
CLASSES |= {f"{name} of the example": of_example(name) for name in ("EveryStepMAML",)}


class Encoder(Net):
    """`[2 + 1] -> [3]`: of an example and its label."""

    def __init__(self):
        super().__init__()
        self.layers[0] = eqx.nn.Linear(3, 32, key=KEY)


def cnp(loss, inner, outer, **options):
    """Class numbers are numbers too."""
    g = eqx.nn.MLP(3 + 2, 2, 16, 1, key=KEY)
    return em.CNP(em.losses.gaussian_nll, outer, decoder=g, **options)


def without_inner(cls, loss, inner, outer, **options):
    return cls(loss, outer, **options)


MADE = {
    "Baseline": functools.partial(em.Baseline, classes=3, features=3),
    "BaselinePlusPlus": functools.partial(em.BaselinePlusPlus, classes=3, features=3),
    "SimpleShot": functools.partial(without_inner, em.SimpleShot, classes=3, features=3),
    "LearntUpdate": functools.partial(em.LearntUpdate, rule=em.rules.KroneckerBlocks),
    "CNP": cnp,
    "MatchingNet": functools.partial(without_inner, em.MatchingNet),
    "RelationNet": functools.partial(
        without_inner, em.RelationNet, relation=eqx.nn.MLP(6, "scalar", 16, 1, key=KEY)
    ),
    "MetaOptNet": functools.partial(without_inner, em.MetaOptNet),
    "ProtoNet": functools.partial(without_inner, em.ProtoNet),
    "R2D2": functools.partial(without_inner, em.R2D2),
    "LastLayerMAML of the docs": functools.partial(
        without_inner, CLASSES["LastLayerMAML of the docs"]
    ),
    "CAVIA": functools.partial(em.CAVIA, context=lambda m: m.layers[0].bias),
    "Towards of the docs": lambda loss, inner, outer, **options: CLASSES["Towards of the docs"](
        inner, loss, **options
    ),
}
MODELS: dict[str, type] = {"CNP": Encoder}
SOURCES: dict[str, type] = dict.fromkeys(["Baseline", "BaselinePlusPlus", "SimpleShot"], Batches)

every_strategy = pytest.mark.parametrize("name", CLASSES)
# What these are made of is tried quickly with MAML, ANIL, MetaSGD, ProtoNet and Baseline.
RELATED = {"FOMAML", "BOIL", "MetaCurvature", "LearntUpdate", "MatchingNet", "BaselinePlusPlus"}
quickly = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in RELATED)) for n in CLASSES]
)
by_gradient = pytest.mark.parametrize(
    "name", [n for n, cls in CLASSES.items() if "task_chunk" in cls.__dataclass_fields__]
)
with_inner_steps = pytest.mark.parametrize(
    "name", [n for n, cls in CLASSES.items() if issubclass(cls, em.RolloutStrategy)]
)


@functools.cache  # the same functions, hence the same compiled programs
def make(name: str, gradient: str = "mixed", **options) -> em.Strategy:
    inner = em.InnerLoop(optax.sgd(0.1), 2, gradient)
    # Not Adam, which makes whole steps of a gradient that is nothing but rounding.
    outer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.3))
    made = MADE.get(name, CLASSES[name])
    return made(em.losses.cross_entropy, inner, outer, **options)


def model_of(name: str):
    return MODELS.get(name, Net)()


def source_of(name: str):
    """The tasks that it trains on."""
    return SOURCES.get(name, Blobs)()


def trainer_of(strategy: em.Strategy, *callbacks, seed: int = 0) -> em.Trainer:
    return em.Trainer(
        strategy, meta_batch_size=4, seed=seed, callbacks=callbacks, summary=False
    )  # fmt: skip


def one_step(name, strategy):
    tasks, model = jax.vmap(source_of(name).sample)(jax.random.split(KEY, 4)), model_of(name)
    return strategy.outer_update(strategy.init(model), tasks, key=KEY)


def test_the_strategies_of_today_are_found():
    assert {"MAML", "Reptile", "ProtoNet", "MetaCurvature"} < CLASSES.keys()
    parameters = jax.tree.leaves(eqx.filter(Net(), eqx.is_inexact_array))
    assert sum(x.size for x in parameters) == 195


@quickly
def test_fit_evaluate_and_resume(name, tmp_path):
    strategy, model = make(name), model_of(name)

    def fit(steps, folder, resume=None):
        seen = Evaluate(Blobs(), every=2, num_tasks=4)
        saved = Checkpoint(tmp_path / folder, every=1, monitor="eval/loss")
        trainer = trainer_of(strategy, seen, saved)
        return trainer.fit(model, source_of(name), steps, resume=resume), seen.result

    whole, result = fit(3, "whole")
    fit(2, "parts")
    parts, again = fit(3, "parts", resume="auto")
    assert int(whole.step) == 3
    assert same_bits(jax.tree.leaves(whole), jax.tree.leaves(parts))
    for metric in result.values:
        assert same_bits(result.values[metric], again.values[metric])

    measured = em.evaluate(strategy, whole.model, Blobs(), num_tasks=4)
    assert tree_allclose(measured.values["loss"], result.values["loss"])
    steps = strategy.num_inner_steps()
    assert measured.values["loss"].shape == (4, 2 if steps is None else steps + 1)
    assert np.isfinite(measured.values["loss"][:, 1:]).all()


class Dropping(Net):
    drop: eqx.nn.Dropout

    def __init__(self, model: Net):
        self.layers, self.drop = model.layers, eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        return self.drop(super().__call__(x), key=key)


ASKING = "RelationNet", "SimpleShot"  # a model what it makes, beside training it


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n not in ASKING))
        for n in CLASSES
        if " of the " not in n  # these are short, and pass no keys on
    ],
)
def test_a_model_may_drop_out(name):
    strategy = make(name)
    if name == "SimpleShot":
        strategy = dataclasses.replace(strategy, center=jnp.ones((5, 2)))
    state = strategy.init(Dropping(model_of(name)))
    tasks = jax.vmap(source_of(name).sample)(jax.random.split(KEY, 4))
    _, metrics = eqx.filter_eval_shape(strategy.outer_update, state, tasks, key=KEY)
    assert "loss" in metrics
    eqx.filter_eval_shape(strategy.inner_adapt, state.model, Blobs().sample(KEY).support, key=KEY)


@pytest.mark.slow
@every_strategy
def test_what_predicts_is_what_is_measured(name):
    strategy = make(name)
    model, task = strategy.init(model_of(name)).model, Blobs().sample(KEY)
    adapted = strategy.inner_adapt(model, task.support)
    expected, _ = strategy.loss(adapted, task.query, None)
    measured = em.evaluate(strategy, model, jax.tree.map(lambda x: x[None], task))
    np.testing.assert_allclose(measured.values["loss"][0, -1], expected, rtol=1e-5)


@pytest.mark.slow
@with_inner_steps
def test_evaluated_with_more_inner_steps_than_trained_with(name):
    strategy = make(name)
    model = strategy.init(model_of(name)).model
    longer = em.evaluate(strategy, model, Blobs(), num_tasks=4, inner_steps=4).values["loss"]
    usual = em.evaluate(strategy, model, Blobs(), num_tasks=4).values["loss"]
    assert longer.shape == (4, 5) and np.isfinite(longer).all()
    np.testing.assert_allclose(longer[:, :3], usual, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@by_gradient
def test_chunks_of_tasks(name, x64):
    whole, metrics = one_step(name, make(name, task_chunk=None))
    parts, of_parts = one_step(name, make(name, task_chunk=2))
    assert tree_allclose(parts, whole, rtol=1e-7, atol=1e-9)
    assert tree_allclose(of_parts, metrics, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@with_inner_steps
def test_mixed_against_reverse(name, x64):
    mixed, metrics = one_step(name, make(name))
    reverse, expected = one_step(name, make(name, "reverse"))
    assert tree_allclose(mixed, reverse, rtol=1e-7, atol=1e-9)
    assert tree_allclose(metrics, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@every_strategy
def test_several_seeds(name):
    strategy, model, source = make(name), model_of(name), source_of(name)
    runs = em.fit_seeds(trainer_of(strategy), model, source, 3, seeds=2)
    for seed in range(2):
        alone = trainer_of(strategy, seed=seed).fit(model, source, 3)
        # The derivative of a machine in float32 is known to about a thousandth.
        atol = 2e-4 if name == "MetaOptNet" else 1e-5
        assert tree_allclose(runs.state(seed).model, alone.model, rtol=1e-3, atol=atol)


@pytest.mark.slow
@every_strategy
def test_plan(name):
    # Of one task there are no chunks, which would be programs more: `preflight/test_plan` has them.
    trainer = em.Trainer(make(name), meta_batch_size=1)
    plan = trainer.plan(model_of(name), source_of(name))
    assert plan.rows and all(row.temp_bytes > 0 and row.flops > 0 for row in plan.rows)


@pytest.mark.slow
@every_strategy
def test_padding_is_nothing(name):
    """Three more support examples of weight 0, far from all others."""
    strategy, task = make(name), Blobs().sample(KEY)
    model = strategy.init(model_of(name)).model
    x, y = task.support
    support = *task.support, jnp.ones(len(x))
    more = jnp.full((3, 2), 9.0), jnp.zeros(3, y.dtype), jnp.zeros(3)
    padded = jax.tree.map(lambda *xs: jnp.concatenate(xs), more, support)
    expected, predicted = (
        em.losses.predict(strategy.inner_adapt(model, s), task.query[0])
        for s in (task.support, padded)
    )
    # In a compiled program there are as many logits as support examples.
    expected, predicted = jax.tree.map(lambda x: x[..., :3], (expected, predicted))
    assert tree_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def first_layer(model):
    return model.layers[0]


@pytest.mark.slow
@every_strategy
def test_learn_says_what_is_learnt(name):
    """The rest stays, to the bit, under weight decay too."""
    strategy, model = make(name, learn=first_layer), model_of(name)
    state = trainer_of(strategy).fit(model, source_of(name), 3)
    own = state.model.model if isinstance(state.model, em.MetaParameters) else state.model
    assert same_bits(own.layers[1:], model.layers[1:])
    assert not tree_allclose(own.layers[0], model.layers[0], rtol=1e-4)


@pytest.mark.slow
@every_strategy
def test_it_learns(name):
    """The loss after adaptation, on tasks of another seed, against that of the first weights."""
    strategy, model = make(name), model_of(name)
    state = trainer_of(strategy).fit(model, source_of(name), 150)
    before, after = (
        em.evaluate(strategy, m, Blobs(), num_tasks=100, seed=1).mean()[-1]
        for m in (strategy.init(model).model, state.model)
    )
    assert after < 0.8 * before
