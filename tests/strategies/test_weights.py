"""Tasks of several sizes in one program: what padding stands for is nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._task.minibatches import _rows_that_exist, _with_number_of_classes
from eqxmeta.callbacks import Checkpoint, Evaluate
from eqxmeta.losses import cross_entropy

from ..boring import same_bits
from ..helpers import tree_allclose

KEY = jax.random.key(0)
INNER = em.InnerLoop(optax.sgd(0.1), 1)
OUTER = optax.sgd(1.0)  # a step is the gradient
STRATEGIES = {
    "MAML": em.MAML(cross_entropy, INNER, OUTER),
    "ProtoNet": em.ProtoNet(cross_entropy, OUTER),
    "Reptile": em.Reptile(cross_entropy, INNER, OUTER),
    "ProtoMAML": em.ProtoMAML(cross_entropy, INNER, OUTER),
}


def cut_batch(rng, ways, count, shape):
    x = jnp.asarray(rng.normal(size=(ways * count, *shape)))
    return x, jnp.repeat(jnp.arange(ways), count)


def padded_batch(rng, batch, ways, most_ways, most):
    """Room for `most_ways` classes of `most` examples, filled with what must not be seen. Examples
    lie apart from one another, as they do class by class."""
    x, y = batch
    count = len(y) // ways
    there = np.zeros((most_ways, most), bool)
    there[:ways, :count] = True
    there = there.ravel()
    padded = 100 * rng.normal(size=(len(there), *x.shape[1:]))
    padded[there] = x
    labels = np.zeros(len(there), int)
    labels[there] = y
    return jnp.asarray(padded), jnp.asarray(labels), jnp.asarray(there, float)


def with_head_of(model, ways):
    """The same model with fewer logits."""
    if model.head is None:
        return model
    first = model.head.weight[:ways], model.head.bias[:ways]
    return eqx.tree_at(lambda m: (m.head.weight, m.head.bias), model, first)


@pytest.mark.parametrize(
    "name",
    [
        "ProtoNet",
        pytest.param("MAML", marks=pytest.mark.slow),
        pytest.param("Reptile", marks=pytest.mark.slow),
        pytest.param("ProtoMAML", marks=pytest.mark.slow),
    ],
)
def test_a_task_cut_to_its_true_size_has_the_same_loss_and_meta_gradient(name, x64):
    """Three of four classes, two of three shots and of three queries, under Conv4's own norm."""
    rng = np.random.default_rng(0)
    support, query = (cut_batch(rng, 3, 2, (1, 16, 16)) for _ in range(2))
    padded = em.Task(*(padded_batch(rng, batch, 3, 4, 3) for batch in (support, query)))
    strategy = STRATEGIES[name]
    model = em.nn.Conv4(1, None if "Proto" in name else 4, size=16, width=3, key=KEY)
    cut = with_head_of(model, 3)

    def step(model, task):
        tasks = jax.tree.map(lambda x: x[None], task)
        state, metrics = strategy.outer_update(strategy.init(model), tasks, key=None)
        before, after = (eqx.filter(m, eqx.is_inexact_array) for m in (model, state.model))
        return jax.tree.map(lambda p, q: p - q, before, after), metrics

    gradient, metrics = step(model, padded)
    expected, of_cut = step(cut, em.Task(support, query))
    assert float(optax.tree.norm(expected)) > 1e-3
    assert metrics.keys() == of_cut.keys() and {"loss", "accuracy", "grad_norm"} <= metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(value, of_cut[key], rtol=1e-12, err_msg=key)
    if model.head is not None:  # of a class that is not there nothing is learnt
        assert not gradient.head.weight[3:].any() and not gradient.head.bias[3:].any()
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    gradient = with_head_of(gradient, 3)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * largest)


class Points(eqx.Module):
    """`[2] -> [4]`"""

    layers: eqx.nn.MLP

    def __init__(self):
        self.layers = eqx.nn.MLP(2, 4, 8, 1, key=KEY)

    def __call__(self, x):
        return self.layers(x)


def episodes(**sizes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 1, 2)) + 0.3 * rng.normal(size=(8, 9, 2))
    labels = np.repeat(np.arange(8), 9)
    return em.tasks.Episodes(x.reshape(-1, 2).astype(np.float32), labels, **sizes)


VARIED = {"ways": (2, 4), "shots": (1, 3), "queries": (2, 5)}


@pytest.mark.slow
def test_fit_evaluate_and_resume_on_tasks_of_several_sizes(tmp_path):
    tasks = episodes(**VARIED)
    strategy = em.ProtoNet(cross_entropy, optax.adam(0.01))

    def fit(steps, folder, resume=None):
        seen = Evaluate(tasks, every=10, num_tasks=50)
        saved = Checkpoint(tmp_path / folder, every=10, monitor="eval/accuracy")
        trainer = em.Trainer(strategy, meta_batch_size=2, summary=False, callbacks=[seen, saved])
        return trainer.fit(Points(), tasks, steps, resume=resume), seen.result

    whole, result = fit(30, "whole")
    fit(10, "parts")
    parts, again = fit(30, "parts", resume="auto")
    assert same_bits(jax.tree.leaves(whole), jax.tree.leaves(parts))
    assert same_bits(result.values["accuracy"], again.values["accuracy"])
    before = em.evaluate(strategy, strategy.init(Points()).model, tasks, num_tasks=50)
    assert result.mean("accuracy")[-1] > before.mean("accuracy")[-1] + 0.02


def test_an_absent_class_is_not_predicted():
    """By a head that says nothing else."""
    tasks = episodes(ways=(2, 2), shots=(1, 1), queries=(3, 3))
    last = Points()
    last = eqx.tree_at(lambda m: m.layers.layers[-1].bias, last, jnp.array([0.0, 0, 0, 50]))
    strategy = STRATEGIES["MAML"]
    measured = em.evaluate(strategy, last, tasks, num_tasks=200)
    assert (measured.values["loss"] < 10).all()
    assert measured.mean("accuracy")[0] == pytest.approx(0.5, abs=0.15)
    plain = em.evaluate(strategy, last, episodes(ways=2, shots=1, queries=3), num_tasks=20)
    assert plain.mean("accuracy")[0] == 0  # without weights it is


@pytest.mark.slow
def test_the_number_of_classes_is_that_of_the_task_in_every_minibatch(x64):
    """Also where the minibatch lacks the last class: as without weights."""
    batches = [cut_batch(np.random.default_rng(i), 4, 3, (2,)) for i in range(2)]
    strategy = em.Reptile(cross_entropy, em.InnerLoop(optax.sgd(0.1), 4), OUTER, batch_size=3)
    state = strategy.init(Points())
    done = []
    for weight in ((), (jnp.ones(12),)):
        task = em.Task(*((*batch, *weight) for batch in batches))
        tasks = jax.tree.map(lambda x: x[None], task)
        done.append(strategy.outer_update(state, tasks, key=KEY))
    assert tree_allclose(*done, rtol=1e-12, atol=1e-12)
    weighted = *batches[0], jnp.ones(12)
    (x, y, weight), rows = _with_number_of_classes(weighted, jnp.zeros((2, 3), int))
    assert (y[rows[:, -1]] == 3).all() and not weight[rows[:, -1]].any() and len(x) == 13


@pytest.mark.parametrize("count", [1, 4, 5, 7, 12])
def test_minibatches_are_of_examples_that_exist(count):
    exists = np.zeros(12, bool)
    exists[np.random.default_rng(count).permutation(12)[:count]] = True
    rows = np.asarray(_rows_that_exist(jnp.asarray(exists), 8, 5, KEY))
    assert rows.shape == (8, 5)
    assert (exists[rows].sum(axis=1) == min(count, 5)).all()
    drawn = rows[exists[rows]]
    for i in range(0, len(drawn) - count + 1, count):  # each epoch is all of them once
        assert set(drawn[i : i + count]) == set(np.flatnonzero(exists))
    assert len({tuple(row) for row in rows.tolist()}) > 4
