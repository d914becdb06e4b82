"""How often a run traces the user's code: a count, which no machine's load changes."""

import collections

import equinox as eqx
import jax
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Callback

KEY = jax.random.key(0)


def counted():
    """A strategy and a source, and how often their loss and `sample` were called by Python."""
    counts = collections.Counter()

    class Tasks(eqx.Module):
        def sample(self, key):
            counts["sample"] += 1
            x = jax.random.normal(key, (8, 1))
            return em.Task((x[:4], x[:4]), (x[4:], x[4:]))

    def loss(model, batch, key):
        counts["loss"] += 1
        return em.losses.mse(model, batch, key)

    strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(1e-3))
    return strategy, Tasks(), counts


# One inner step, and the query loss before and after it.
ONCE = {"sample": 1, "loss": 3}


@pytest.mark.parametrize("several", [False, True])
def test_a_run_traces_the_loss_and_the_tasks_once(several):
    strategy, tasks, counts = counted()
    before = []

    class Begin(Callback):
        def on_fit_start(self, run):
            before.append(dict(counts))

    model = eqx.nn.MLP(1, 1, 8, 2, key=KEY)
    callbacks = [] if several else [Begin()]
    trainer = em.Trainer(strategy, meta_batch_size=4, summary=False, callbacks=callbacks)
    if several:
        em.fit_seeds(trainer, model, tasks, 20, seeds=2)
    else:
        trainer.fit(model, tasks, steps=20)
        assert before == [ONCE]
    assert counts == ONCE


def test_an_evaluation_traces_the_loss_and_the_tasks_once():
    strategy, tasks, counts = counted()
    model = eqx.nn.MLP(1, 1, 8, 2, key=KEY)
    em.evaluate(strategy, model, tasks, num_tasks=150)  # of which 100 at a time, and the rest
    first = dict(counts)
    assert first["sample"] == 1 and first["loss"] <= 3
    em.evaluate(strategy, model, tasks, num_tasks=150)
    assert counts == first
