"""Relation networks, against the paper's equations in NumPy and against easyfsl."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from .metric_tasks import (
    LABELS,
    QUERIES,
    SUPPORT,
    along,
    answers,
    assert_padding_is_nothing,
    task_of,
    wide,
)

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def relation() -> eqx.nn.MLP:
    return eqx.nn.MLP(6, "scalar", 5, 1, activation=jnp.tanh, key=jax.random.key(1))


def relation_net(module, loss=em.losses.sigmoid_mse, outer=None, **options) -> em.RelationNet:
    return em.RelationNet(loss, outer or optax.sgd(1.0), relation=module, **options)


RELATION_NET = relation_net(relation())  # one, so that its programs are compiled once


def embedding() -> eqx.nn.MLP:
    return eqx.nn.MLP(4, 3, 8, 1, activation=jnp.tanh, key=KEY)


def mlp(model: eqx.nn.MLP, x) -> np.ndarray:
    first, last = model.layers
    hidden = np.tanh(np.asarray(x) @ np.asarray(first.weight).T + np.asarray(first.bias))
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def by_hand(learnt, support, x) -> np.ndarray:
    """The relation of each query to each class, before its sigmoid: `[examples, ways]`."""
    features, queries, y = mlp(learnt.model, support[0]), mlp(learnt.model, x), support[1]
    rows = np.full((len(queries), max(y) + 1), -np.inf)
    for i, query in enumerate(queries):
        for k in set(np.asarray(y).tolist()):
            mean = features[np.asarray(y) == k].mean(axis=0)
            rows[i, k] = mlp(learnt.extra, np.concatenate([mean, query])).item()
    return rows


class Maps(eqx.Module):
    """Features as a map `[2, 2, 1]`."""

    factor: jax.Array

    def __call__(self, x):
        return (self.factor * x).reshape(2, 2, 1)


class Sum(eqx.Module):
    """What a convolution as large as its map, `[4, 2, 1]`, computes."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.sum(self.weight * x) + 0.05


def test_the_relations_of_easyfsl(x64):
    """Of feature maps, by a convolution with weights 0.1 to 0.8."""
    expected = [
        [0.9453186827840592, 0.9836975006285591, 0.9720774262159271],
        [0.759510916949111, 0.9168273035060777, 0.8641271029909058],
        [0.5621765008857981, 0.8175744761936437, 0.7211151780228631],
    ]
    strategy = relation_net(Sum(jnp.arange(1.0, 9.0).reshape(4, 2, 1) / 10), ways=3)
    model = strategy.init(Maps(jnp.ones(()))).model
    support = jnp.asarray(SUPPORT), jnp.asarray(LABELS)
    found = jax.nn.sigmoid(answers(strategy, model, support, jnp.asarray(QUERIES)))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("labels", [[2, 0, 2, 1, 2], [0, 3, 3, 0, 0]])
def test_logits_against_the_equation(labels, x64):
    """Unbalanced and unsorted; with classes that are not there."""
    task = task_of(1, np.array(labels))
    learnt = RELATION_NET.init(wide(embedding())).model
    logits = answers(RELATION_NET, learnt, task.support, task.query[0])
    expected = by_hand(wide(learnt), task.support, task.query[0])
    assert logits.shape == (6, 5) and np.isneginf(logits[:, expected.shape[1] :]).all()
    np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, rtol=1e-6)


def test_the_outer_step_descends_equation_2(x64):
    """In the embedding, and in the relation."""
    strategy = relation_net(wide(relation()))
    task = task_of(2)
    x, y = task.query

    def loss(learnt):
        relations = 1 / (1 + np.exp(-by_hand(learnt, task.support, x)))
        return np.sum((relations - np.eye(3)[np.asarray(y)]) ** 2) / len(y)

    along(strategy, wide(embedding()), task, loss)


def test_padding_is_nothing(x64):
    """Nor for a relation that normalises by the pairs of the support set."""
    module = wide(eqx.nn.Sequential([em.nn.SupportNorm(6), relation()]))
    assert_padding_is_nothing(relation_net(module), wide(embedding()), task_of(3))


def test_a_relation_is_normalised_by_the_pairs_of_the_support_set(x64):
    """Each support example with each class: by hand. No query depends on the others."""
    task, norm = task_of(4), em.nn.SupportNorm(6)
    strategy = relation_net(eqx.nn.Sequential([wide(norm), wide(relation())]))
    learnt = strategy.init(wide(embedding())).model
    f, y = mlp(learnt.model, task.support[0]), np.asarray(task.support[1])
    means = np.stack([f[y == k].mean(axis=0) for k in range(3)])
    pairs = np.stack([np.concatenate([c, row]) for row in f for c in means])
    mean, deviation = pairs.mean(axis=0), np.sqrt(pairs.var(axis=0) + 1e-5)
    query = mlp(learnt.model, task.query[0][:1])[0]
    expected = [
        mlp(learnt.extra[1], (np.concatenate([c, query]) - mean) / deviation).item() for c in means
    ]
    alone = answers(strategy, learnt, task.support, task.query[0][:1])
    np.testing.assert_allclose(alone[0, :3], expected, rtol=1e-9)


class Identity(eqx.Module):
    factor: jax.Array

    def __call__(self, x):
        return self.factor * x


class Blobs(eqx.Module):
    """Two classes that differ in the first of four numbers; the others are ten times as large."""

    def sample(self, key):
        where, noise = jax.random.split(key)
        side = jax.random.choice(where, jnp.array([-1.0, 1.0]))
        x = 10 * jax.random.normal(noise, (2, 8, 4))
        signal = side * jnp.array([[-1.0], [1.0]]) + 0.02 * x[:, :, 0]
        x = x.at[:, :, 0].set(signal)
        y = jnp.broadcast_to(jnp.arange(2)[:, None], (2, 8))
        batches = ((x[:, s].reshape(-1, 4), y[:, s].ravel()) for s in (slice(1), slice(1, 8)))
        return em.Task(*batches)


@pytest.mark.slow
def test_what_it_learns_is_the_relation():
    """The features stay as they are, and no fixed distance between them tells the classes apart. A
    relation that is fixed, minus the distance, is a prototypical network."""
    still = {"learn": lambda m: (), "ways": 2}
    module = eqx.nn.MLP(8, "scalar", 32, 1, key=KEY)
    loss, model = em.losses.cross_entropy, Identity(jnp.ones(()))
    strategy = relation_net(module, loss, optax.adam(1e-2), **still)
    trainer = em.Trainer(strategy, meta_batch_size=16, summary=False)
    learnt = trainer.fit(model, Blobs(), 300).model
    assert learnt.model.factor == 1
    fixed = relation_net(lambda pair: -jnp.sum((pair[:4] - pair[4:]) ** 2), loss, ways=2)
    proto_net = em.ProtoNet(loss, optax.sgd(1.0), ways=2)
    ours, theirs, parents = (
        em.evaluate(strategy, model, Blobs(), num_tasks=100).mean("accuracy")[-1]
        for strategy, model in (
            (strategy, learnt),
            (fixed, fixed.init(model).model),
            (proto_net, model),
        )
    )
    assert ours > 0.9 and theirs < 0.65
    np.testing.assert_allclose(theirs, parents, atol=1e-6)


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`RelationNet\(ways=...\)`" + THREE_PARTS):
        relation_net(relation(), ways=0)
    for module in (None, eqx.nn.MLP):
        with pytest.raises(TypeError, match=r"`RelationNet\(relation=...\)`" + THREE_PARTS):
            relation_net(module)
    with pytest.raises(TypeError, match="is not all that `RelationNet` learns" + THREE_PARTS):
        RELATION_NET.inner_adapt(embedding(), (jnp.ones((2, 4)), jnp.array([0, 1])))
