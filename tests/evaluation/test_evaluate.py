"""`evaluate`: what is measured, on which tasks, and what its numbers mean."""

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

from ..helpers import TinyMLP, tiny_mlp, tree_allclose

KEY = jax.random.key(0)
MSE = em.losses.mse
SOURCE = em.tasks.Sinusoid(4, 6)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


@functools.cache  # the same optimizers, hence the same compiled programs
def maml(*, inner=None, steps: int = 2, loss=MSE) -> em.MAML:
    return em.MAML(loss, em.InnerLoop(inner or optax.sgd(0.05), steps), optax.sgd(0.1))


@functools.cache
def reptile(**options) -> em.Reptile:
    return em.Reptile(MSE, em.InnerLoop(optax.sgd(0.05), 2), optax.sgd(0.1), **options)


def fixed_tasks(num_tasks: int = 3, source=SOURCE) -> em.Task:
    return jax.vmap(source.sample)(jax.random.split(KEY, num_tasks))


def task_of(tasks: em.Task, i: int) -> em.Task:
    return jax.tree.map(lambda x: x[i], tasks)


def losses_by_hand(strategy, model, tasks: em.Task, steps: int) -> np.ndarray:
    """`[tasks, steps + 1]`: a fresh `inner_adapt` for every number of steps."""
    after = [eqx.tree_at(lambda s: s.inner.steps, strategy, k) for k in range(1, steps + 1)]
    rows = []
    for i in range(len(tasks.support[0])):
        task = task_of(tasks, i)
        models = [model] + [s.inner_adapt(model, task.support) for s in after]
        rows.append([strategy.loss(m, task.query, None)[0] for m in models])
    return np.asarray(rows)


# The curve.


@pytest.mark.parametrize(
    "strategy",
    [
        maml(inner=optax.adam(0.05)),
        em.Joint(MSE, em.InnerLoop(optax.sgd(0.05, momentum=0.9), 1), optax.sgd(0.1)),
        reptile(inner_state="carry"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_curve_is_inner_adapt_with_0_1_2_steps(strategy):
    """Also beyond the steps that the strategy trains with, and with an optimizer's state."""
    values = em.evaluate(strategy, tiny_mlp(), fixed_tasks(), inner_steps=3).values["loss"]
    assert values.shape == (3, 4)
    expected = losses_by_hand(strategy, tiny_mlp(), fixed_tasks(), 3)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert np.all(np.abs(np.diff(values, axis=1)) > 1e-6)


def test_a_batch_of_tasks_in_64_bits(x64):
    tasks, strategy = fixed_tasks(), maml(inner=optax.adam(0.05))
    values = em.evaluate(strategy, tiny_mlp(), tasks).values["loss"]
    expected = losses_by_hand(strategy, tiny_mlp(), tasks, 2)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_a_curve_is_the_beginning_of_a_longer_one():
    """Also where minibatches are drawn."""
    for strategy in (maml(), reptile(batch_size=2)):
        short, long = (
            em.evaluate(strategy, tiny_mlp(), SOURCE, num_tasks=4, inner_steps=k).values["loss"]
            for k in (1, 3)
        )
        np.testing.assert_allclose(long[:, :2], short, rtol=1e-5)


def test_as_many_steps_as_in_training_unless_told():
    result = em.evaluate(maml(steps=2), tiny_mlp(), fixed_tasks())
    assert result.values["loss"].shape == (3, 3)


def test_every_metric_of_the_loss_has_a_curve():
    def loss(model, batch, key):
        value, _ = MSE(model, batch, key)
        return value, {"root": jnp.sqrt(value), "above": value > 1}

    result = em.evaluate(maml(loss=loss), tiny_mlp(), fixed_tasks())
    assert set(result.metrics) == {"loss", "root", "above"}
    np.testing.assert_allclose(result.values["root"], result.values["loss"] ** 0.5, rtol=1e-6)
    np.testing.assert_array_equal(result.values["above"], result.values["loss"] > 1)
    np.testing.assert_allclose(result.mean("above"), np.mean(result.values["loss"] > 1, axis=0))


def test_a_metric_may_not_be_called_loss():
    """It would stand in the place of the loss, as in training, where it is refused."""

    def loss(model, batch, key):
        return MSE(model, batch, key)[0], {"loss": jnp.array(-7.0)}

    with pytest.raises(ValueError, match="reserved name" + THREE_PARTS):
        em.evaluate(maml(loss=loss), tiny_mlp(), fixed_tasks())


class OneStep(em.Strategy):
    """Knows nothing of an `InnerLoop`."""

    loss: em._types.Loss

    def init(self, model):
        raise NotImplementedError

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        grads = eqx.filter_grad(lambda m: self.loss(m, support, None)[0])(model)
        return jax.tree.map(lambda p, g: p - 0.05 * g, model, grads)

    def outer_update(self, state, tasks, *, key):
        raise NotImplementedError


def test_a_strategy_without_an_inner_loop_is_measured_before_and_after():
    values = em.evaluate(OneStep(MSE), tiny_mlp(), fixed_tasks()).values["loss"]
    expected = losses_by_hand(maml(), tiny_mlp(), fixed_tasks(), 1)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`evaluate\(inner_steps=\.\.\.\)`" + THREE_PARTS):
        em.evaluate(OneStep(MSE), tiny_mlp(), fixed_tasks(), inner_steps=2)


class WithLoop(em.RolloutStrategy):
    """Neither a field `optimizer` nor a gradient."""

    loss: em._types.Loss
    inner: em.InnerLoop

    def init(self, model):
        raise NotImplementedError

    def inner_rollout(self, model, support, **options):
        return self.inner(self.loss, model, support, **options)

    def outer_update(self, state, tasks, *, key):
        raise NotImplementedError


def test_any_strategy_with_inner_steps_has_a_curve():
    strategy = WithLoop(MSE, em.InnerLoop(optax.sgd(0.05), 5))
    values = em.evaluate(strategy, tiny_mlp(), fixed_tasks(), inner_steps=2).values["loss"]
    np.testing.assert_allclose(
        values, losses_by_hand(maml(), tiny_mlp(), fixed_tasks(), 2), rtol=1e-5
    )


class Wrapped(eqx.Module):
    """What a strategy that learns more than an initialisation keeps as `TrainState.model`."""

    model: TinyMLP
    rate: Array

    def __call__(self, x: Array) -> Array:
        return self.model(x)


class LearntRate(OneStep):
    """`inner_adapt` takes what is meta-learnt, and returns a model of the user's type."""

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        grads = eqx.filter_grad(lambda m: self.loss(m, support, None)[0])(model.model)
        return jax.tree.map(lambda p, g: p - model.rate * g, model.model, grads)


def test_a_strategy_that_learns_more_than_the_model():
    model = Wrapped(tiny_mlp(), jnp.array(0.05))
    values = em.evaluate(LearntRate(MSE), model, fixed_tasks()).values["loss"]
    expected = losses_by_hand(maml(), tiny_mlp(), fixed_tasks(), 1)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# The tasks.


def test_tasks_depend_on_the_seed_alone():
    few, more, other = (
        em.evaluate(maml(), tiny_mlp(), SOURCE, num_tasks=n, seed=seed).values["loss"]
        for n, seed in ((5, 3), (230, 3), (5, 4))
    )
    # More tasks than are evaluated at once, and a number that leaves a remainder.
    assert more.shape == (230, 3)
    np.testing.assert_allclose(more[:5], few, rtol=1e-5)
    assert np.all(np.abs(other - few) > 1e-6)
    assert len(np.unique(more[:, 0])) == 230
    again = em.evaluate(maml(), tiny_mlp(), SOURCE, num_tasks=5, seed=3).values["loss"]
    np.testing.assert_array_equal(again, few)


def test_dropout_and_minibatches_depend_on_the_seed_alone():
    """What is random in adaptation belongs to the task, however many there are."""
    few, more = (
        em.evaluate(reptile(batch_size=1), tiny_mlp(), SOURCE, num_tasks=n).values["loss"]
        for n in (3, 7)
    )
    np.testing.assert_allclose(more[:3], few, rtol=1e-5)


class Recording(eqx.Module):
    """Its tasks tell the keys that they were drawn from."""

    def sample(self, key: Array) -> em.Task:
        x = jax.random.uniform(key, (1, 1))
        return em.Task((x, x), (x, x))


def test_training_and_evaluation_with_the_same_seed_are_on_different_tasks():
    def loss(model, batch, key):
        return jnp.mean(0 * model.out.bias), {"task": batch[0][0, 0]}

    evaluated = em.evaluate(maml(loss=loss), tiny_mlp(), Recording(), num_tasks=50, seed=0)
    root = jax.random.key(0)
    trained = {
        float(Recording().sample(key).support[0][0, 0])
        for step in range(5)
        for key in [root, *jax.random.split(jax.random.fold_in(root, step), 10)]
    }
    assert not trained & set(evaluated.values["task"][:, 0].tolist())
    assert len(set(evaluated.values["task"][:, 0].tolist())) == 50


def test_a_batch_of_tasks_is_used_as_it_is():
    """In order, all of them, whatever `num_tasks` and `seed` say."""
    first = em.evaluate(maml(), tiny_mlp(), fixed_tasks(5), num_tasks=2, seed=0).values["loss"]
    second = em.evaluate(maml(), tiny_mlp(), fixed_tasks(5), num_tasks=600, seed=9).values["loss"]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(
        first, losses_by_hand(maml(), tiny_mlp(), fixed_tasks(5), 2), rtol=1e-5
    )


def test_evaluation_changes_nothing():
    model = tiny_mlp()
    em.evaluate(maml(), model, fixed_tasks())
    assert tree_allclose(model, tiny_mlp(), rtol=0, atol=0)


# Queries by themselves.


class Rich(eqx.Module):
    """Layers that could let examples see each other, and would in other libraries."""

    body: TinyMLP
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout

    def __init__(self):
        self.body = tiny_mlp()
        self.norm = eqx.nn.LayerNorm(8)
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        hidden = self.dropout(self.norm(self.body.hidden(x)), key=key)
        return self.body.out(jax.nn.tanh(hidden))


def test_a_prediction_does_not_depend_on_the_other_queries():
    def loss(model, batch, key):
        value, _ = MSE(model, batch, key)
        return value, {"first": em.losses.predict(model, batch[0], key)[0, 0]}

    tasks = fixed_tasks()
    x, y = tasks.query
    others = em.Task(tasks.support, (x.at[:, 1:].set(-3.0), y.at[:, 1:].set(100.0)))
    fewer = em.Task(tasks.support, (x[:, :1], y[:, :1]))
    strategy = maml(loss=loss)
    usual, changed, alone = (
        em.evaluate(strategy, Rich(), t, inner_steps=2).values for t in (tasks, others, fewer)
    )
    np.testing.assert_array_equal(usual["first"], changed["first"])
    np.testing.assert_allclose(usual["first"], alone["first"], rtol=1e-5)
    # The curve is that of a model that adapts, and the other queries do count in the loss.
    assert np.all(usual["first"][:, 0] != usual["first"][:, 2])
    assert np.all(usual["loss"] != changed["loss"])


# The numbers.


def test_mean_and_interval():
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    result = em.Evaluation({"loss": values, "accuracy": values > 0})
    n = 7  # 2.446912 is the 97.5 % point of Student's t with 6 degrees of freedom
    for k in range(3):
        column = [float(v) for v in values[:, k]]
        mean = sum(column) / n
        variance = sum((v - mean) ** 2 for v in column) / (n - 1)
        assert result.mean()[k] == pytest.approx(mean, rel=1e-12)
        assert result.ci95()[k] == pytest.approx(2.446912 * (variance / n) ** 0.5)
        # A proportion: per-task values of 0 and 1.
        p = sum(v > 0 for v in column) / n
        assert result.mean("accuracy")[k] == pytest.approx(p)
        expected = 2.446912 * (p * (1 - p) / (n - 1)) ** 0.5
        assert result.ci95("accuracy")[k] == pytest.approx(expected)
    assert result.mean().dtype == np.float64


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1001, 1.962)]
)
def test_the_interval_is_students(df, t):
    """The table of Student's t, two-sided 95 %."""
    values = np.random.default_rng(df).normal(size=(df + 1, 1))
    error = np.std(values, ddof=1) / (df + 1) ** 0.5
    interval = em.Evaluation({"loss": values}).ci95()[0]
    assert abs(interval / error - t) < 5.1e-4


def test_an_evaluation_is_printed_in_a_line():
    """After the last step, of two tasks: mean 3 and 2, interval 12.7 times 1 and 0."""
    curve = np.array([[9.0, 2.0], [9.0, 4.0]])
    result = em.Evaluation({"loss": curve, "accuracy": 0 * curve + 2}, transductive=True)
    expected = "2 tasks, after adaptation: loss=3 ± 13, accuracy=2 ± 0, transductive=True"
    assert repr(result) == f"Evaluation({expected})"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 400 evaluations of 50 tasks each, 95 % in the long run, 1.1 % being one deviation."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        result = em.Evaluation({"loss": rng.normal(2.0, 3.0, (50, 1))})
        covered += abs(result.mean()[0] - 2.0) < result.ci95()[0]
    assert 0.91 < covered / 400 < 0.98


def test_an_unknown_metric_is_an_error_that_names_those_there_are():
    result = em.evaluate(maml(), tiny_mlp(), fixed_tasks())
    for ask in (result.mean, result.ci95):
        with pytest.raises(KeyError, match=r"'accuracy'.*Expected.*'loss'"):
            ask("accuracy")


# Arguments.


@pytest.fixture
def as_users_run_it():
    """Without the annotations' check by beartype (see conftest), which would be first to raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class NoModule:
    def sample(self, key):
        return SOURCE.sample(key)


class NoTask(eqx.Module):
    def sample(self, key):
        return SOURCE.sample(key).support


class Empty(eqx.Module):
    def sample(self, key):
        (x, y), query = SOURCE.sample(key).support, SOURCE.sample(key).query
        return em.Task((x[:0], y[:0]), query)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("strategy", em.MAML, TypeError),
        ("strategy", MSE, TypeError),
        ("model", TinyMLP, TypeError),
        ("model", None, ValueError),
        ("tasks", em.tasks.Sinusoid, TypeError),
        ("tasks", NoModule(), TypeError),
        ("tasks", NoTask(), TypeError),
        ("tasks", Empty(), ValueError),
        ("tasks", [1, 2, 3], TypeError),
        ("num_tasks", 0, ValueError),
        ("num_tasks", 2.0, TypeError),
        ("num_tasks", True, TypeError),
        ("inner_steps", 0, ValueError),
        ("inner_steps", -1, ValueError),
        ("inner_steps", 1.5, TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", jax.random.key(0), TypeError),
        ("seed", 0.0, TypeError),
    ],
)
def test_wrong_arguments_are_named(argument, value, error):
    arguments = {
        "strategy": maml(),
        "model": tiny_mlp(),
        "tasks": SOURCE,
        "num_tasks": 2,
        "inner_steps": 1,
        "seed": 0,
    }
    with pytest.raises(error, match=rf"`evaluate\({argument}=\.\.\.\)[^`]*`" + THREE_PARTS):
        em.evaluate(**(arguments | {argument: value}))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "tasks",
    [
        em.Task((), ()),
        jax.tree.map(lambda x: x[:0], fixed_tasks()),
        em.Task(fixed_tasks(3).support, fixed_tasks(2).query),
        em.Task((jnp.ones((3, 2, 1)), jnp.ones((2, 2, 1))), (jnp.ones((3, 2, 1)),) * 2),
        SOURCE.sample(KEY),  # one task, not a batch
    ],
    ids=["empty", "no task", "unequal", "unequal leaves", "no task axis"],
)
def test_batches_that_are_none_are_refused(tasks):
    with pytest.raises(ValueError, match=r"`evaluate\(tasks=\.\.\.\)[^`]*`" + THREE_PARTS):
        em.evaluate(maml(), tiny_mlp(), tasks)


@pytest.mark.parametrize("wrong", ["support", "query"])
@pytest.mark.parametrize("as_batch", [True, False])
def test_labels_without_a_logit_are_nan_and_told_of(wrong, as_batch):
    # From 1 on, of three classes, in the last task alone: the others would hide it in the mean.
    def labels(shift):
        y = np.tile(np.array([0, 1, 2], np.int32), (4, 1))
        y[-1] += shift
        return y

    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    shifts = {"support": 0, "query": 0, wrong: 1}
    batch = em.Task(*((x, labels(shifts[name])) for name in ("support", "query")))
    model = eqx.nn.Linear(5, 3, key=jax.random.key(0))

    class Last(eqx.Module):
        def sample(self, key):
            return jax.tree.map(lambda leaf: jnp.asarray(leaf[-1]), batch)

    message = rf"NaN for {'1 of 4' if as_batch else '5 of 5'} tasks(?s:.)*{wrong}\[1\]` from 1 to 3"
    for strategy in (
        maml(loss=em.losses.cross_entropy),
        em.ANIL(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1)),
        em.ProtoNet(em.losses.cross_entropy, optax.sgd(0.1), ways=3),
    ):
        with pytest.warns(RuntimeWarning, match=message):
            result = em.evaluate(strategy, model, batch if as_batch else Last(), num_tasks=5)
        for name in ("loss", "accuracy"):
            assert np.isnan(result.mean(name)[-1])
            assert np.isfinite(result.values[name][:-1, -1]).all() == as_batch


def test_one_task_in_the_place_of_a_batch_is_told_of():
    task = em.tasks.Sinusoid(4, 4).sample(jax.random.key(0))
    with pytest.raises(Exception) as caught:
        em.evaluate(maml(), tiny_mlp(), task)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Of one task: `jax.tree.map(lambda x: x[None], task)`" in told
