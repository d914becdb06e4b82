"""The library runs clean under the flags by which JAX looks for mistakes, and finds the same."""

import contextlib

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Evaluate

from ..boring import same_bits

SGD = optax.sgd(0.1)
FLAGS = {
    "key reuse": (lambda: jax.debug_key_reuse(True),),
    "others": (
        lambda: jax.debug_nans(True),
        lambda: jax.enable_checks(True),
        lambda: jax.numpy_rank_promotion("raise"),
    ),
}


class Dropping(eqx.Module):
    """A linear model behind dropout."""

    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, inputs, outputs):
        self.linear = eqx.nn.Linear(inputs, outputs, key=jax.random.key(0))
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        return self.linear(self.dropout(x, key=key))


def inner(**options):
    return em.InnerLoop(SGD, steps=2, **options)


def waves():
    return Dropping(1, 1), em.tasks.Sinusoid(shots=2, queries=2)


def episodes():
    images = np.random.default_rng(0).random((12, 4)).astype(np.float32)
    return Dropping(4, 3), em.tasks.Episodes(images, np.arange(12) // 3, ways=3, shots=1, queries=1)


def embeddings():
    _, tasks = episodes()
    return Dropping(4, 2), tasks


CASES = {
    "MAML": (lambda: em.MAML(em.losses.mse, inner(), SGD), waves),
    "reverse": (lambda: em.MAML(em.losses.mse, inner(gradient="reverse"), SGD), waves),
    "FOMAML": (lambda: em.FOMAML(em.losses.mse, em.InnerLoop(SGD, 4), SGD), waves),
    "window": (lambda: em.MAML(em.losses.mse, em.InnerLoop(SGD, 5, window=2), SGD), waves),
    "IMAML": (lambda: em.IMAML(em.losses.mse, inner(), SGD), waves),
    "ProtoMAML": (lambda: em.ProtoMAML(em.losses.cross_entropy, inner(), SGD), embeddings),
    "ANIL": (lambda: em.ANIL(em.losses.mse, inner(), SGD), waves),
    "remat": (lambda: em.MAML(em.losses.mse, em.InnerLoop(SGD, 5, remat=2), SGD), waves),
    "Reptile": (lambda: em.Reptile(em.losses.mse, inner(), SGD, batch_size=2), waves),
    "ProtoNet": (lambda: em.ProtoNet(em.losses.cross_entropy, SGD), episodes),
    "MAML on episodes": (lambda: em.MAML(em.losses.cross_entropy, inner(), SGD), episodes),
}


LONG = em.InnerLoop(SGD, 4, window=2)


@pytest.mark.parametrize(
    "strategy",
    [
        em.MAML(em.losses.mse, inner(), SGD),
        em.MAML(em.losses.mse, LONG, SGD),
        pytest.param(em.FOMAML(em.losses.mse, LONG, SGD), marks=pytest.mark.slow),
        em.IMAML(em.losses.mse, LONG, SGD),
    ],
)
def test_a_model_that_takes_a_key_is_no_reuse_of_it(strategy):
    """One outer step, in which dropout has a key for each inner step, before it and after."""
    model, tasks = waves()
    keys = jax.random.split(jax.random.key(1), 3)
    with jax.debug_key_reuse(True):
        batch = jax.vmap(tasks.sample)(jax.random.split(keys[0], 2))
        strategy.outer_update(strategy.init(model), batch, key=keys[1])


@pytest.mark.slow
def test_looking_at_a_model_uses_no_key_again():
    """The classes of a task are drawn from the same key as the task, and a figure has the same
    minibatches whatever the number of steps."""
    with jax.debug_key_reuse(True):
        model, tasks = episodes()
        maml = em.MAML(em.losses.cross_entropy, inner(), SGD)
        result = em.evaluate(maml, model, tasks, num_tasks=2, predictions=True)
        assert result.predictions.classes.shape == (2, 3)
        model, tasks = waves()
        reptile = em.Reptile(em.losses.mse, inner(), SGD, batch_size=2)  # which splits its key
        em.plot_adaptation({"Reptile": (reptile, model)}, tasks, inner_steps=(1, 2), num_tasks=1)


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("case", CASES)
def test_runs_clean(flag, case, tmp_path):
    """A run with an evaluation, its resumption; then each by itself. With the same result."""
    make, data = CASES[case]

    def run(folder, steps, **options):
        model, tasks = data()
        saved = Checkpoint(folder, every=1)
        callbacks = [Evaluate(tasks, every=2, num_tasks=2), saved]
        trainer = em.Trainer(make(), meta_batch_size=2, callbacks=callbacks, summary=False)
        return trainer.fit(model, tasks, steps, **options)

    jax.clear_caches()
    with contextlib.ExitStack() as held:
        for enter in FLAGS[flag]:
            held.enter_context(enter())
        run(tmp_path / "flagged", 1)
        state = run(tmp_path / "flagged", 2, resume="auto")
        model, tasks = data()
        strategy, keys = make(), jax.random.split(jax.random.key(1), 3)
        batch = jax.vmap(tasks.sample)(jax.random.split(keys[0], 2))
        strategy.outer_update(strategy.init(model), batch, key=keys[1])
        strategy.inner_adapt(model, jax.tree.map(lambda x: x[0], batch.support), key=keys[2])
    jax.clear_caches()
    assert same_bits(state, run(tmp_path / "plain", 2))
