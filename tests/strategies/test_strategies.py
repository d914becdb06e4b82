"""The strategies by themselves: without a Trainer, their metrics, their extension points."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em

from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
NAMES = ["MAML", "FOMAML", "Joint", "Reptile"]
each_strategy = pytest.mark.parametrize("name", NAMES)
# Of the four, two whose outer updates have nothing in common.
two_strategies = pytest.mark.parametrize("name", ["MAML", "Reptile"])
two_quickly = pytest.mark.parametrize(
    "name", ["MAML", "Reptile", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:3])]
)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


@functools.cache  # the same optimizers, hence the same compiled programs
def strategy_of(name: str, *, steps: int = 3, loss=MSE, outer=None) -> em.Strategy:
    return getattr(em, name)(loss, em.InnerLoop(optax.sgd(0.1), steps), outer or optax.sgd(0.05))


def sine_tasks(num_tasks: int = 3) -> em.Task:
    return jax.vmap(em.tasks.Sinusoid(4, 6).sample)(jax.random.split(KEY, num_tasks))


def task_of(tasks: em.Task, i: int) -> em.Task:
    return jax.tree.map(lambda x: x[i], tasks)


class Classifier(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self):
        self.linear = eqx.nn.Linear(2, 3, key=KEY)

    def __call__(self, x: Array) -> Array:
        return self.linear(x)


def classification_tasks() -> em.Task:
    x = jax.random.normal(KEY, (2, 15, 2))
    y = jnp.argmax(jnp.stack([x[..., 0], x[..., 1], jnp.ones((2, 15)) / 4], -1), -1)
    return em.Task((x[:, :6], y[:, :6]), (x[:, 6:], y[:, 6:]))


# Without a Trainer.


@two_quickly
def test_usable_without_a_trainer(name):
    # Reptile's own rate is that of its interpolation.
    outer = optax.sgd(0.5) if name == "Reptile" else optax.adam(0.01)
    strategy, tasks = strategy_of(name, outer=outer), sine_tasks()
    state = strategy.init(tiny_mlp())
    assert isinstance(state, em.TrainState) and int(state.step) == 0
    losses = []
    for i in range(30):
        state, metrics = strategy.outer_update(state, tasks, key=jax.random.key(i))
        losses.append(float(metrics["pooled_loss" if name == "Joint" else "loss"]))
    assert int(state.step) == 30
    assert losses[-1] < 0.9 * losses[0]
    adapted = strategy.inner_adapt(state.model, task_of(tasks, 0).support)
    assert type(adapted) is type(state.model)


@two_strategies
def test_inner_adapt_is_gradient_descent_on_the_support_set(name):
    support = task_of(sine_tasks(), 0).support
    expected = tiny_mlp()
    for _ in range(3):
        expected = one_step(MSE, expected, support)
    adapted = strategy_of(name).inner_adapt(tiny_mlp(), support)
    assert tree_allclose(adapted, expected)


@two_strategies
def test_inside_other_transformations(name):
    """Seeds under `vmap`, steps under `scan`, tasks under `vmap`: as one by one."""
    strategy, tasks = strategy_of(name), sine_tasks()

    def run(key):
        first = strategy.init(tiny_mlp(key))

        def step(state, key):
            state, metrics = strategy.outer_update(state, tasks, key=key)
            return state, metrics["loss"]

        return jax.lax.scan(step, first, jax.random.split(key, 2))

    keys = jax.random.split(KEY, 2)
    states, losses = jax.jit(jax.vmap(run))(keys)
    assert losses.shape == (2, 2) and states.step.tolist() == [2, 2]
    state = strategy.init(tiny_mlp(keys[1]))
    for key in jax.random.split(keys[1], 2):
        state, _ = strategy.outer_update(state, tasks, key=key)
    assert tree_allclose(jax.tree.map(lambda x: x[1], states), state, rtol=1e-4, atol=1e-6)

    adapted = jax.vmap(lambda support: strategy.inner_adapt(state.model, support))(tasks.support)
    alone = strategy.inner_adapt(state.model, task_of(tasks, 2).support)
    assert tree_allclose(jax.tree.map(lambda x: x[2], adapted), alone, rtol=1e-4, atol=1e-6)


@two_strategies
def test_host_arrays_are_tasks(name):
    """What a host source yields is NumPy; so is what a user has at hand for `inner_adapt`."""
    strategy, tasks = strategy_of(name), sine_tasks()
    state = strategy.init(tiny_mlp())
    expected, _ = strategy.outer_update(state, tasks, key=KEY)
    host = em.Task(
        (np.asarray(tasks.support[0]), np.asarray(tasks.support[1])),
        (np.asarray(tasks.query[0]), np.asarray(tasks.query[1])),
    )
    ours, _ = strategy.outer_update(state, host, key=KEY)
    assert tree_allclose(ours, expected)
    support = task_of(host, 0).support
    assert tree_allclose(
        strategy.inner_adapt(tiny_mlp(), support),
        strategy.inner_adapt(tiny_mlp(), task_of(tasks, 0).support),
    )


@two_strategies
def test_batches_may_be_any_pytree(name):
    def loss(model, batch, key):
        prediction = jax.vmap(model)(batch["in"]["x"])
        return jnp.mean(batch["weight"][:, None] * (prediction - batch["y"]) ** 2), {}

    def renamed(examples):
        x, y = examples
        return {"in": {"x": x, "nothing": None}, "y": y, "weight": jnp.ones(y.shape[:-1])}

    tasks = sine_tasks()
    ours, usual = strategy_of(name, loss=loss), strategy_of(name)
    state, metrics = ours.outer_update(
        ours.init(tiny_mlp()), em.Task(renamed(tasks.support), renamed(tasks.query)), key=KEY
    )
    expected, expected_metrics = usual.outer_update(usual.init(tiny_mlp()), tasks, key=KEY)
    assert tree_allclose(state.model, expected.model)
    assert tree_allclose(metrics, expected_metrics)


def test_support_and_query_may_differ_in_structure():
    def loss(model, batch, key):
        x, y, *weight = batch
        squared = (jax.vmap(model)(x) - y) ** 2
        return jnp.mean(squared if not weight else weight[0] * squared), {}

    tasks = sine_tasks()
    weighted = em.Task((*tasks.support, jnp.ones_like(tasks.support[1])), tasks.query)
    ours = strategy_of("FOMAML", loss=loss)
    state, _ = ours.outer_update(ours.init(tiny_mlp()), weighted, key=KEY)
    expected, _ = ours.outer_update(ours.init(tiny_mlp()), tasks, key=KEY)
    assert tree_allclose(state.model, expected.model)


@pytest.mark.parametrize("name", ["Joint", "Reptile"])
def test_what_is_not_split_must_be_alike(name):
    tasks = sine_tasks()
    weighted = em.Task((*tasks.support, jnp.ones_like(tasks.support[1])), tasks.query)
    strategy = strategy_of(name, loss=lambda model, batch, key: MSE(model, batch[:2], key))
    with pytest.raises(ValueError, match="cannot be pooled" + THREE_PARTS):
        strategy.outer_update(strategy.init(tiny_mlp()), weighted, key=KEY)


# Metrics.


@eqx.filter_jit
def one_step(loss, model, data):
    grads = eqx.filter_grad(lambda m: loss(m, data, None)[0])(model)
    return jax.tree.map(lambda p, g: p - 0.1 * g, model, grads)


measured = eqx.filter_jit(lambda loss, model, batch: loss(model, batch, None))


def by_hand(strategy: em.Strategy, model, tasks: em.Task, loss=MSE) -> dict[str, np.ndarray]:
    """Every metric, from `inner_adapt`s of 0, 1, ... steps, one task after another."""
    steps = strategy.inner.steps
    rows = []
    for i in range(len(tasks.support[0])):
        task = task_of(tasks, i)
        data = task.pooled if isinstance(strategy, em.Reptile) else task.support
        models = [model]
        for _ in range(steps):
            models.append(one_step(loss, models[-1], data))
        before, before_metrics = measured(loss, model, task.query)
        after, metrics = measured(loss, models[-1], task.query)
        row = {"loss": after, "loss_before": before, **metrics}
        row |= {f"{name}_before": value for name, value in before_metrics.items()}
        row |= {f"support_loss/{k}": measured(loss, models[k], data)[0] for k in range(steps)}
        if isinstance(strategy, em.Joint):
            row["pooled_loss"] = row["objective"] = measured(loss, model, task.pooled)[0]
        rows.append(row)
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


@each_strategy
def test_metrics_are_what_they_are_called(name):
    # The outer step is plain descent at rate 1, so that it shows the gradient.
    strategy, tasks = strategy_of(name, outer=optax.sgd(1.0)), sine_tasks()
    state = strategy.init(tiny_mlp())
    new, metrics = strategy.outer_update(state, tasks, key=KEY)
    expected = by_hand(strategy, state.model, tasks)
    step = jax.tree.map(lambda old, new: old - new, state.model, new.model)
    squares = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(step))
    expected["grad_norm"] = np.sqrt(squares)
    assert metrics.keys() == expected.keys()
    assert all(value.shape == () for value in metrics.values())
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-4, err_msg=metric)


@two_strategies
def test_classification_adds_accuracy(name):
    strategy = strategy_of(name, loss=em.losses.cross_entropy)
    tasks = classification_tasks()
    assert len(np.unique(tasks.query[1])) > 1
    state = strategy.init(Classifier())
    _, metrics = strategy.outer_update(state, tasks, key=KEY)
    expected = by_hand(strategy, state.model, tasks, em.losses.cross_entropy)
    assert {"accuracy", "accuracy_before"} < expected.keys()
    assert metrics.keys() == expected.keys() | {"grad_norm"}
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-4, err_msg=metric)


def test_joint_reports_adaptation_but_does_not_learn_from_it():
    """Whatever the inner loop does, the outer step is the same."""
    tasks = sine_tasks()
    results = [
        strategy.outer_update(strategy.init(tiny_mlp()), tasks, key=None)
        for strategy in (
            em.Joint(MSE, em.InnerLoop(optax.sgd(0.1), 3), optax.sgd(0.1)),
            em.Joint(MSE, em.InnerLoop(optax.adam(0.01), 1), optax.sgd(0.1)),
        )
    ]
    (first, metrics), (second, other_metrics) = results
    assert tree_allclose(first.model, second.model)
    assert float(metrics["loss"]) != float(other_metrics["loss"])


def reporting(*names: str):
    """A loss that reports a metric under each of `names`."""

    def loss(model, batch, key):
        return MSE(model, batch, key)[0], {name: jnp.array(-7.0) for name in names}

    return loss


@two_quickly
@pytest.mark.parametrize(
    "names",
    [
        ["loss"],
        ["loss_before"],
        ["grad_norm"],
        ["step"],
        # What the strategies themselves report.
        ["support_loss/0"],
        ["hit", "hit_before"],
    ],
    ids=" ".join,
)
def test_reserved_names_of_metrics(name, names):
    strategy = strategy_of(name, loss=reporting(*names))
    state, tasks = strategy.init(tiny_mlp()), sine_tasks()
    with pytest.raises(ValueError, match=rf"reserved name{THREE_PARTS}") as caught:
        eqx.filter_eval_shape(lambda s, t: strategy.outer_update(s, t, key=KEY), state, tasks)
    assert repr(names[-1]) in str(caught.value)


@pytest.mark.parametrize("name", ["MAML", "Joint"])
def test_no_other_name_takes_the_place_of_a_metric(name):
    """Refused or reported, but never in place of the strategy's own `loss` and `pooled_loss`."""
    reported = ("objective", "pooled_loss")
    strategy, usual = strategy_of(name, loss=reporting(*reported)), strategy_of(name)
    state, tasks = usual.init(tiny_mlp()), sine_tasks()
    _, expected = usual.outer_update(state, tasks, key=KEY)
    try:
        _, metrics = strategy.outer_update(state, tasks, key=KEY)
    except ValueError as error:
        assert "reserved name" in str(error) and any(word in str(error) for word in reported)
        return
    assert all(float(metrics[word]) == -7 for word in reported)
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-5, err_msg=metric)


# One's own strategies.


class OwnMAML(em.GradientStrategy):
    """As short as it gets: two fields and `inner_adapt`."""

    loss: em._types.Loss
    optimizer: optax.GradientTransformation

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        for _ in range(3):
            grads = eqx.filter_grad(lambda m: self.loss(m, support, key)[0])(model)
            model = jax.tree.map(lambda p, g: p - 0.1 * g, model, grads)
        return model


def test_a_strategy_is_one_method():
    own, builtin, tasks = (
        OwnMAML(MSE, optax.adam(0.01)),
        strategy_of("MAML", outer=optax.adam(0.01)),
        sine_tasks(),
    )
    state, expected = own.init(tiny_mlp()), builtin.init(tiny_mlp())
    for i in range(2):
        state, metrics = own.outer_update(state, tasks, key=jax.random.key(i))
        expected, builtin_metrics = builtin.outer_update(expected, tasks, key=jax.random.key(i))
    assert tree_allclose(state.model, expected.model, rtol=1e-4, atol=1e-6)
    # It has no inner loop to report on; the rest is there.
    assert metrics.keys() == {"loss", "loss_before", "grad_norm"}
    for metric, value in metrics.items():
        np.testing.assert_allclose(value, builtin_metrics[metric], rtol=1e-4)


def doubled(model):
    return jax.tree.map(lambda p: 2.0 * p, model)


class Doubled(em.MAML):
    """Adapts by a rule of its own."""

    def inner_rollout(self, model, support, **options):
        return self.inner(self.loss, doubled(model), support, **options)


class DoubledReptile(em.Reptile):
    def inner_rollout(self, model, support, **options):
        return self.inner(self.loss, doubled(model), support, **options)


STILL = em.InnerLoop(optax.sgd(0.0), 3)


def test_an_overridden_inner_rollout_is_what_is_trained_and_measured():
    strategy = Doubled(MSE, STILL, optax.sgd(0.1))
    tasks, model = sine_tasks(), tiny_mlp()
    losses = [MSE(doubled(model), task_of(tasks, i).query, None)[0] for i in range(3)]
    _, metrics = strategy.outer_update(strategy.init(model), tasks, key=KEY)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    values = em.evaluate(strategy, model, tasks, inner_steps=2).values["loss"]
    np.testing.assert_allclose(values, np.stack([losses] * 3, axis=1), rtol=1e-5)
    adapted = strategy.inner_adapt(model, task_of(tasks, 0).support)
    assert tree_allclose(adapted, doubled(model))


def test_reptile_trains_with_an_overridden_inner_rollout():
    """What is evaluated must be what is trained: here the way to `2 w` is `w` itself."""
    strategy = DoubledReptile(MSE, STILL, optax.sgd(0.5))
    model = tiny_mlp()
    state, _ = strategy.outer_update(strategy.init(model), sine_tasks(), key=KEY)
    assert tree_allclose(state.model, jax.tree.map(lambda p: 1.5 * p, model))


class AdaptsItself:
    def inner_adapt(self, model, support, *, key=None):
        return model


@pytest.mark.parametrize("bases", [(em.MAML,), (em.Reptile,), (em.RolloutStrategy,)])
def test_an_inner_adapt_beside_a_rollout_is_refused(bases):
    inner_adapt = AdaptsItself.inner_adapt
    with pytest.raises(TypeError, match=r"`Own.inner_adapt`" + THREE_PARTS):
        type(em.MAML)("Own", bases, {"inner_adapt": inner_adapt})
    with pytest.raises(TypeError, match=r"`Own.inner_adapt`" + THREE_PARTS):
        type(em.MAML)("Own", (AdaptsItself, *bases), {})


@pytest.mark.parametrize("base", [em.Strategy, em.GradientStrategy, em.ProtoNet])
def test_a_rollout_that_would_not_be_used_is_refused(base):
    with pytest.raises(TypeError, match="`Own.inner_rollout` would not be used" + THREE_PARTS):
        type(em.MAML)("Own", (base,), {"inner_rollout": lambda self, model, support: None})


class ByStep(em.MAML):
    """Half of the query loss in the first two outer steps, all of it afterwards."""

    def task_loss(self, model, task, *, step, key):
        loss, metrics = super().task_loss(model, task, step=step, key=key)
        return jnp.where(step < 2, 0.5, 1.0) * loss, metrics | {"loss": loss, "seen": step}


def test_a_task_loss_knows_the_outer_step_and_reports_the_loss_beside_its_objective():
    arguments = MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(0.1)
    strategy, plain = ByStep(*arguments), em.MAML(*arguments)
    tasks, state = sine_tasks(), plain.init(tiny_mlp())
    for step in range(4):
        _, metrics = strategy.outer_update(state, tasks, key=KEY)
        expected, wanted = plain.outer_update(state, tasks, key=KEY)
        share = 0.5 if step < 2 else 1.0
        assert metrics["seen"] == step
        np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["objective"], share * wanted["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], share * wanted["grad_norm"], rtol=1e-5)
        state = expected


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (jnp.float32(1.0), TypeError),
        ((jnp.ones(2), {}), ValueError),
        ((jnp.float32(1.0), {"grad_norm": jnp.float32(1.0)}), ValueError),
        ((jnp.float32(1.0), {"matrix": jnp.ones((2, 2))}), ValueError),
    ],
)
def test_what_a_task_loss_returns_is_checked(out, error):
    class Own(em.MAML):
        def task_loss(self, model, task, *, step, key):
            return out

    own = Own(MSE, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    with pytest.raises(error, match=r"`Own.task_loss\(...\)`" + THREE_PARTS):
        own.outer_update(own.init(tiny_mlp()), sine_tasks(), key=KEY)


@pytest.mark.parametrize(
    "task_loss",
    [
        lambda self, model, task, key: None,
        lambda self, model, task, *, key=None: None,
        lambda self, model, support, query, *, step, key: None,
    ],
)
def test_a_task_loss_of_another_signature_is_refused(task_loss):
    expected = r"Expected: `task_loss\(self, model, task, \*, step, key\)`"
    with pytest.raises(TypeError, match=rf"`Own.task_loss`[^\n]+\nReceived: .*\n{expected}"):
        type(em.MAML)("Own", (em.MAML,), {"task_loss": task_loss})
    type(em.MAML)("Own", (em.MAML,), {"task_loss": lambda self, *tasks, **options: None})


class Rated(eqx.Module):
    model: eqx.Module
    rate: Array


@pytest.mark.parametrize(
    ("learnt", "received"),
    [
        (lambda model: Rated(model, jnp.ones(())), "`Rated`"),
        (lambda model: (model, jnp.ones(())), "`tuple`"),
        (lambda model: None, "`NoneType`"),
        (lambda model: em.MetaParameters(model, {"rate": 0.0}), r"extra\['rate'\]=0.0"),
    ],
)
def test_what_meta_model_returns_is_checked(learnt, received):
    class Own(em.MAML):
        def meta_model(self, model):
            return learnt(model)

    own = Own(MSE, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    expected = r"Expected: `eqxmeta.MetaParameters\(model, extra\)`"
    with pytest.raises(
        TypeError, match=rf"`Own.meta_model`[^\n]+\nReceived: .*{received}.*\n{expected}"
    ):
        own.init(tiny_mlp())


class Coordinates(eqx.Module):
    """Central differences along every coordinate: an estimator that does not differentiate."""

    def __call__(self, objective, params, *, key):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        moved = jax.vmap(lambda d: objective(unravel(flat + d))[0])
        size = 1e-4 * jnp.eye(flat.size)
        grads = (moved(size) - moved(-size)) / 2e-4
        return objective(params), unravel(grads)


@pytest.mark.parametrize("task_chunk", [None, 1])
def test_an_estimator_takes_the_place_of_the_gradient(task_chunk, x64):
    arguments = MSE, em.InnerLoop(optax.sgd(0.1), 2), optax.sgd(0.1)
    tasks, model = sine_tasks(), tiny_mlp()
    exact = em.MAML(*arguments)
    own = em.MAML(*arguments, estimator=Coordinates(), task_chunk=task_chunk)
    state, metrics = own.outer_update(own.init(model), tasks, key=KEY)
    expected, wanted = exact.outer_update(exact.init(model), tasks, key=KEY)
    assert tree_allclose(state.model, expected.model, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-12)


# Arguments.


@pytest.fixture
def as_users_run_it():
    """Without the annotations' check by beartype (see conftest), which would be first to raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
@each_strategy
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("loss", None),
        ("loss", "mse"),
        ("loss", TypeError),
        ("inner", optax.sgd(0.1)),
        ("inner", 3),
        ("inner", em.InnerLoop),
        ("optimizer", 1e-3),
        ("optimizer", optax.adam),
        ("optimizer", em.InnerLoop(optax.sgd(0.1), 1)),
    ],
)
def test_wrong_arguments_are_named(name, argument, value):
    arguments = {"loss": MSE, "inner": em.InnerLoop(optax.sgd(0.1), 1), "optimizer": optax.sgd(0.1)}
    strategy = getattr(em, name)
    strategy(**arguments)
    with pytest.raises(TypeError, match=rf"`{name}\({argument}=\.\.\.\)`" + THREE_PARTS):
        strategy(**(arguments | {argument: value}))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("batch_size", 0, ValueError),
        ("batch_size", 2.0, TypeError),
        ("batch_size", True, TypeError),
        ("inner_state", "keep", ValueError),
        ("inner_state", None, ValueError),
    ],
)
def test_wrong_arguments_of_reptile_are_named(argument, value, error):
    with pytest.raises(error, match=rf"`Reptile\({argument}=\.\.\.\)`" + THREE_PARTS):
        em.Reptile(MSE, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1), **{argument: value})


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("optimizer", optax.sgd, TypeError),
        ("optimizer", 0.1, TypeError),
        ("steps", 0, ValueError),
        ("steps", -1, ValueError),
        ("steps", 1.0, TypeError),
        ("steps", True, TypeError),
        ("gradient", "exact", ValueError),
        ("gradient", None, ValueError),
    ],
)
def test_wrong_arguments_of_the_inner_loop_are_named(argument, value, error):
    arguments = {"optimizer": optax.sgd(0.1), "steps": 1, "gradient": "mixed"}
    with pytest.raises(error, match=rf"`InnerLoop\({argument}=\.\.\.\)`" + THREE_PARTS):
        em.InnerLoop(**(arguments | {argument: value}))


def test_a_model_adapted_to_labels_without_a_logit_predicts_nothing():
    """With `N` logits, labels from 1 to N: NaN, in the loss and in the accuracy."""
    model, x = eqx.nn.Linear(2, 3, key=KEY), jnp.arange(12.0).reshape(6, 2)
    labels = jnp.array([0, 1, 2] * 2)
    inner, outer = em.InnerLoop(optax.sgd(0.1), steps=1), optax.sgd(1.0)
    for make in (em.MAML, em.ANIL, em.MetaSGD, em.Reptile, em.Joint):
        strategy = make(em.losses.cross_entropy, inner, outer)
        state = strategy.init(model)
        for shift in (1, -1, 0):
            adapted = strategy.inner_adapt(state.model, (x, labels + shift))
            loss, metrics = em.losses.cross_entropy(adapted, (x, labels), None)
            finite = [bool(np.isfinite(value)) for value in (loss, metrics["accuracy"])]
            assert finite == [shift == 0] * 2


def test_traced_labels_that_are_no_class_leave_nothing_finite():
    model, x = eqx.nn.Linear(2, 3, key=KEY), jnp.ones((3, 2))
    for gradient in ("mixed", "reverse", "first_order"):
        inner = em.InnerLoop(optax.sgd(0.1), 2, gradient)
        strategy = em.MAML(em.losses.cross_entropy, inner, optax.sgd(1.0))
        tasks = em.Task((x[None], jnp.array([[1, 2, 3]])), (x[None], jnp.array([[0, 1, 2]])))
        _, metrics = strategy.outer_update(strategy.init(model), tasks, key=None)
        assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])
