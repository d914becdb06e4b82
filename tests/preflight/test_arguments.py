"""Mistakes with the trainer are told before anything is compiled, in three parts, by name."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Callback, Checkpoint, ProgressBar

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    boring_fit,
    compilations,
    host_batch,
)

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def check(mistake, error, argument):
    # Also as a class of its own: what a type checker would raise, or an assertion, is neither.
    assert error in (TypeError, ValueError)
    with compilations() as compiled, pytest.raises(error) as caught:
        mistake()
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.search(rf"(?s)\A[^\n]*{argument}[^\n]*\nReceived: .+\nExpected: .+", message), message
    assert compiled == []


def trainer(strategy=None, **options):
    strategy = BoringStrategy() if strategy is None else strategy
    return em.Trainer(strategy, **{"meta_batch_size": 2, **options})


SGD = optax.sgd(0.1)
INNER = em.InnerLoop(SGD, steps=1)


@pytest.mark.parametrize(
    ("mistake", "error", "argument"),
    [
        (lambda: trainer(em.MAML), TypeError, "strategy"),
        (lambda: trainer(optax.adam(1e-3)), TypeError, "strategy"),
        (lambda: trainer(BoringModel()), TypeError, "strategy"),
        (lambda: trainer("MAML"), TypeError, "strategy"),
        (lambda: trainer(meta_batch_size=0), ValueError, "meta_batch_size"),
        (lambda: trainer(meta_batch_size=True), TypeError, "meta_batch_size"),
        (lambda: trainer(meta_batch_size=2.0), TypeError, "meta_batch_size"),
        (lambda: trainer(meta_batch_size=None), TypeError, "meta_batch_size"),
        (lambda: trainer(seed=jax.random.key(0)), TypeError, "seed"),
        (lambda: trainer(seed=jax.random.PRNGKey(0)), TypeError, "seed"),
        (lambda: trainer(seed=-1), ValueError, "seed"),
        (lambda: trainer(seed=2**32), ValueError, "seed"),
        (lambda: trainer(seed=0.0), TypeError, "seed"),
        (lambda: trainer(seed=False), TypeError, "seed"),
        (lambda: trainer(steps_per_execution=0), ValueError, "steps_per_execution"),
        (lambda: trainer(steps_per_execution=1.0), TypeError, "steps_per_execution"),
        (lambda: trainer(steps_per_execution=True), TypeError, "steps_per_execution"),
        (lambda: trainer(steps_per_execution="fast"), TypeError, "steps_per_execution"),
        (lambda: trainer(fast_dev_run=0), ValueError, "fast_dev_run"),
        (lambda: trainer(fast_dev_run=-1), ValueError, "fast_dev_run"),
        (lambda: trainer(fast_dev_run=2.5), TypeError, "fast_dev_run"),
        (lambda: trainer(max_time=0), ValueError, "max_time"),
        (lambda: trainer(max_time=-1.5), ValueError, "max_time"),
        (lambda: trainer(max_time=float("nan")), ValueError, "max_time"),
        (lambda: trainer(max_time="01:00"), ValueError, "max_time"),
        (lambda: trainer(max_time=True), ValueError, "max_time"),
    ],
)
def test_trainer(mistake, error, argument):
    check(mistake, error, rf"Trainer\({argument}=")


class Misspelt(Callback):
    def on_stepend(self, run):
        pass


class WrongSignature(Callback):
    def on_chunk_end(self, run):
        pass


class TooManyParameters(Callback):
    def on_fit_end(self, run, state):
        pass


class NotAHook(Callback):
    on_fit_end = None


class NeverSaysWhen(Callback):
    def on_step_end(self, run):
        pass


class NoName(Callback):
    name = 5


def every(value):
    return [Recorder(every=value)]


@pytest.mark.parametrize(
    ("callbacks", "error", "argument"),
    [
        ([ProgressBar], TypeError, r"callbacks\[0\]"),
        ([ProgressBar(), print], TypeError, r"callbacks\[1\]"),
        ([ProgressBar(), None], TypeError, r"callbacks\[1\]"),
        (ProgressBar(), TypeError, "callbacks"),
        (None, TypeError, "callbacks"),
        ([ProgressBar(), ProgressBar()], ValueError, r"callbacks\[1\].*name"),
        ([Recorder("a"), Recorder("b"), Recorder("a")], ValueError, r"callbacks\[2\].*name"),
        ([NoName()], TypeError, r"callbacks\[0\].*name"),
        ([Misspelt()], TypeError, r"callbacks\[0\].*hook"),
        ([WrongSignature()], TypeError, r"callbacks\[0\].*signature"),
        ([TooManyParameters()], TypeError, r"callbacks\[0\].*signature"),
        ([NotAHook()], TypeError, r"callbacks\[0\].*hook"),
        ([NeverSaysWhen()], ValueError, r"callbacks\[0\].*on_step_end"),
        (every(0), ValueError, r"callbacks\[0\].*every"),
        (every(-5), ValueError, r"callbacks\[0\].*every"),
        (every(2.0), TypeError, r"callbacks\[0\].*every"),
        (every(True), TypeError, r"callbacks\[0\].*every"),
    ],
)
def test_callbacks(callbacks, error, argument):
    check(lambda: trainer(callbacks=callbacks), error, argument)


def test_a_callback_is_told_apart_by_its_name():
    trainer(callbacks=[Recorder("a"), Recorder("b"), ProgressBar(), ProgressBar(name="second")])


class Plain:
    """A source in every way but one."""

    def sample(self, key):
        return BoringTasks().sample(key)


class Samples(eqx.Module):
    task: object

    def sample(self, key):
        return self.task


class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm
    layer: eqx.nn.Linear

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
        self.layer = eqx.nn.Linear(3, 1, key=jax.random.key(0))


EXAMPLES = (jnp.ones((4, 3)), jnp.ones((4, 1)))


def task(support, query=EXAMPLES):
    return Samples(em.Task(support, query))


def generator():
    yield host_batch(0)


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": -3}, ValueError, "steps"),
        ({"steps": True}, TypeError, "steps"),
        ({"steps": 1e4}, TypeError, "steps"),
        ({"model": BoringModel}, TypeError, "model"),
        ({"model": eqx.nn.Identity()}, ValueError, "model"),
        ({"model": Stateful()}, ValueError, "model"),
        ({"tasks": BoringTasks}, TypeError, "tasks"),
        ({"tasks": em.tasks.Sinusoid}, TypeError, "tasks"),
        ({"tasks": Plain()}, TypeError, "tasks"),
        ({"tasks": BoringModel()}, TypeError, "tasks"),
        ({"tasks": generator()}, TypeError, "tasks"),
        ({"tasks": BoringTasks().sample(jax.random.key(0))}, TypeError, "tasks"),
        ({"tasks": None}, TypeError, "tasks"),
        ({"tasks": Samples(jnp.ones(3))}, TypeError, r"tasks=.*sample"),
        ({"tasks": Samples((jnp.ones(3), jnp.ones(3)))}, TypeError, r"tasks=.*sample"),
        ({"tasks": task((jnp.ones((0, 3)), jnp.ones((0, 1))))}, ValueError, "tasks=.*support"),
        ({"tasks": task((jnp.ones((4, 3)),) * 2, ())}, ValueError, "tasks=.*query"),
        ({"tasks": task((1.0, 2.0))}, ValueError, "tasks=.*support"),
        ({"resume": "auto"}, ValueError, "resume="),
        ({"resume": 5}, TypeError, "resume="),
        ({"resume": True}, TypeError, "resume="),
    ],
)
def test_fit(arguments, error, argument):
    arguments = {"model": BoringModel(), "tasks": BoringTasks(), "steps": 5, **arguments}
    recorder = Recorder()
    check(lambda: trainer(callbacks=[recorder]).fit(**arguments), error, argument)
    assert recorder.events == []


def test_resume_auto_is_refused_with_callbacks_that_do_not_save():
    check(lambda: boring_fit(5, callbacks=[Recorder()], resume="auto"), ValueError, "resume=")


def test_steps_before_the_checkpoint(tmp_path):
    boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])

    def fit(steps):
        return boring_fit(steps, callbacks=[Checkpoint(tmp_path, every=10)], resume="auto")

    check(lambda: fit(19), ValueError, r"fit\(steps=.*checkpoint")
    assert int(fit(20).step) == 20


def with_loss(loss):
    return trainer(em.MAML(loss, INNER, SGD))


@pytest.mark.parametrize(
    ("loss", "error", "argument"),
    [
        (lambda model, batch, key: jnp.ones(4), TypeError, "loss"),
        (lambda model, batch, key: jnp.ones(()), TypeError, "loss"),
        (lambda model, batch, key: None, TypeError, "loss"),
        (lambda model, batch, key: (jnp.ones(()),), TypeError, "loss"),
        (lambda model, batch, key: (jnp.ones(()), {}, 3), TypeError, "loss"),
        (lambda model, batch, key: (jnp.ones(()), jnp.ones(())), TypeError, "loss"),
        (lambda model, batch, key: (jnp.ones(()), None), TypeError, "loss"),
        (lambda model, batch, key: (jnp.ones(4), {}), ValueError, "loss"),
        (lambda model, batch, key: (jnp.ones((), int), {}), ValueError, "loss"),
        (lambda model, batch, key: (0.0, {}), ValueError, "loss"),
        (lambda model, batch, key: (jnp.ones(()), {"a": jnp.ones(4)}), ValueError, "metrics.*loss"),
        (lambda model, batch, key: (jnp.ones(()), {"a": "b"}), ValueError, "metrics.*loss"),
        (lambda model, batch, key: (jnp.ones(()), {3: jnp.ones(())}), ValueError, "metrics.*loss"),
        (lambda model, batch, key: (jnp.ones(()), {"step": jnp.ones(())}), ValueError, "loss"),
    ],
)
def test_loss(loss, error, argument):
    check(lambda: with_loss(loss).fit(BoringModel(), BoringTasks(), 5), error, argument)


@pytest.mark.parametrize(
    ("mistake", "argument"),
    [
        (lambda: em.MAML(0.5, INNER, SGD), r"MAML\(loss="),
        (lambda: em.FOMAML(eqx.nn.MLP, INNER, SGD), r"FOMAML\(loss="),
        (lambda: em.Reptile(em.losses.mse, SGD, SGD), r"Reptile\(inner="),
        (lambda: em.Joint(em.losses.mse, INNER, 1e-3), r"Joint\(optimizer="),
        (lambda: em.MAML(em.losses.mse, INNER, optax.adam), r"MAML\(optimizer="),
        (lambda: em.InnerLoop(0.01, steps=1), r"InnerLoop\(optimizer="),
        (lambda: em.InnerLoop(SGD, steps=1.0), r"InnerLoop\(steps="),
    ],
)
def test_strategies(mistake, argument):
    check(mistake, TypeError, argument)


class Wrong(BoringStrategy):
    """`outer_update` with its result spoilt by `spoil(state, metrics)`."""

    spoil: object = None

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        return self.spoil(*BoringStrategy.outer_update(self, state, tasks, key=key))


def narrowed(state, metrics):
    weight = state.model.weight.astype(jnp.float16)
    return eqx.tree_at(lambda s: s.model.weight, state, weight), metrics


def grown(state, metrics):
    weight = jnp.concatenate([state.model.weight] * 2)
    return eqx.tree_at(lambda s: s.model.weight, state, weight), metrics


def forgetful(state, metrics):
    return em.TrainState(state.step, state.model, ()), metrics


def with_metrics(**wrong):
    return lambda state, metrics: (state, metrics | wrong)


@pytest.mark.parametrize(
    ("spoil", "error", "argument"),
    [
        (narrowed, ValueError, r"outer_update.*dtype"),
        (grown, ValueError, r"outer_update.*shape"),
        (forgetful, ValueError, r"outer_update.*structure"),
        (lambda state, metrics: state, TypeError, "outer_update"),
        (lambda state, metrics: (metrics, state), TypeError, "outer_update"),
        (lambda state, metrics: (state.model, metrics), TypeError, "outer_update"),
        (lambda state, metrics: (state, metrics["loss"]), TypeError, "metrics.*outer_update"),
        (lambda state, metrics: (state, None), TypeError, "metrics.*outer_update"),
        (with_metrics(worse=jnp.ones(4)), ValueError, "metrics.*outer_update"),
        (with_metrics(worse=1.5), ValueError, "metrics.*outer_update"),
        (with_metrics(step=jnp.ones(())), ValueError, "metrics.*outer_update"),
    ],
)
def test_outer_update(spoil, error, argument):
    recorder = Recorder()
    fit = trainer(Wrong(spoil=spoil), callbacks=[recorder]).fit
    check(lambda: fit(BoringModel(), BoringTasks(), 5), error, argument)
    assert recorder.events == []


def test_what_changed_in_the_state_is_named():
    with pytest.raises(ValueError, match=r"model\.weight: float32\[3\] -> float16\[3\]"):
        boring_fit(5, strategy=Wrong(spoil=narrowed))
    with pytest.raises(ValueError, match=r"opt_state\.bias: float32\[1\] -> None"):
        boring_fit(5, strategy=Wrong(spoil=forgetful))


class BadInit(BoringStrategy):
    result: object = None

    def init(self, model):
        return self.result


@pytest.mark.parametrize(
    "result",
    [
        None,
        BoringModel(),
        (jnp.int32(0), BoringModel(), ()),
    ],
)
def test_init(result):
    fit = trainer(BadInit(result=result)).fit
    check(lambda: fit(BoringModel(), BoringTasks(), 5), TypeError, "init")


def test_the_users_own_error_is_left_as_it_is():
    def loss(model, batch, key):
        raise RuntimeError("in the user's loss")

    with compilations() as compiled, pytest.raises(RuntimeError, match="in the user's loss"):
        with_loss(loss).fit(BoringModel(), BoringTasks(), 5)
    assert compiled == []
