"""Prototypical networks, against the paper's equations in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tree_allclose
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


def embedding() -> eqx.nn.MLP:
    return eqx.nn.MLP(4, 3, 8, 1, key=KEY)


def proto_net(outer=None, **options) -> em.ProtoNet:
    return em.ProtoNet(em.losses.cross_entropy, outer or optax.sgd(1.0), **options)


def blobs(ways: int, shots: int, queries: int = 2, classes: int = 12) -> em.tasks.Episodes:
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((classes, 1, 4))
    x = (centres + rng.standard_normal((classes, 10, 4))).reshape(-1, 4).astype(np.float32)
    return em.tasks.Episodes(x, np.repeat(np.arange(classes), 10), ways, shots, queries)


def by_hand(embed, support, x) -> np.ndarray:
    """Equation 1 and the exponent of equation 2, class by class: `[examples, ways]`."""
    features, labels = np.asarray(jax.vmap(embed)(support[0]), np.float64), np.asarray(support[1])
    queries = np.asarray(jax.vmap(embed)(x), np.float64)
    columns = []
    for k in range(labels.max() + 1):
        of_class = features[labels == k]
        if not len(of_class):
            columns.append(np.full(len(queries), -np.inf))
            continue
        columns.append(-((queries - of_class.mean(axis=0)) ** 2).sum(axis=1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([0, 0, 1, 1, 2, 2], marks=pytest.mark.slow),
        [2, 0, 2, 1, 2, 2],
        [0, 3, 3, 0, 0, 3],
    ],
)
def test_logits_against_the_equations(labels):
    """Sorted and balanced; neither; and with classes that are not there."""
    x, query = jax.random.normal(KEY, (6, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    support = (x, jnp.array(labels))
    model = embedding()
    classifier = proto_net().inner_adapt(model, support)
    logits = classifier(query[0])  # one example
    assert logits.shape == (max(labels) + 1,)
    expected = by_hand(model, support, query)
    np.testing.assert_allclose(jax.vmap(classifier)(query), expected, rtol=1e-4, atol=1e-5)
    # In a compiled program the labels are not known: more logits, the same probabilities.
    traced = jax.jit(lambda s: jax.vmap(proto_net().inner_adapt(model, s))(query))(support)
    assert traced.shape == (5, 6)
    padded = np.pad(np.exp(expected), ((0, 0), (0, 6 - expected.shape[1])))
    np.testing.assert_allclose(np.exp(traced), padded, rtol=1e-3, atol=1e-6)
    fixed = proto_net(ways=5).inner_adapt(model, support)
    assert fixed(query[0]).shape == (5,)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_labels_of_8_bits_with_more_examples_than_they_can_count(dtype):
    labels = np.repeat(np.arange(60), 5).astype(dtype)
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    traced = jax.jit(lambda s: jax.vmap(proto_net().inner_adapt(embedding(), s))(x[:3]))
    expected = by_hand(embedding(), (x, labels), x[:3])
    np.testing.assert_allclose(traced((x, labels))[:, :60], expected, rtol=1e-4, atol=1e-5)


def test_the_outer_step_is_that_of_plain_jax():
    tasks = jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 2))
    strategy, model = proto_net(), embedding()

    def task_loss(model, task):
        (x, _), (xq, yq) = task.support, task.query
        centres = jax.vmap(model)(x).reshape(3, 2, 3).mean(axis=1)  # sorted and balanced
        distances = ((jax.vmap(model)(xq)[:, None] - centres[None]) ** 2).sum(axis=2)
        log_p = -distances - jax.nn.logsumexp(-distances, axis=1, keepdims=True)
        return -jnp.mean(log_p[jnp.arange(6), yq])

    loss, grads = eqx.filter_value_and_grad(
        lambda m: jnp.mean(jax.vmap(lambda t: task_loss(m, t))(tasks))
    )(model)
    state, metrics = strategy.outer_update(strategy.init(model), tasks, key=KEY)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    params, new, grads = (eqx.filter(m, eqx.is_inexact_array) for m in (model, state.model, grads))
    descended = jax.tree.map(lambda p, q: p - q, params, new)
    assert tree_allclose(descended, grads, rtol=1e-3, atol=1e-6)
    # There is no classifier before it has seen a support set.
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}


def test_more_ways_in_training_than_in_testing():
    strategy = proto_net(optax.adam(1e-2))
    trainer = em.Trainer(strategy, meta_batch_size=1, summary=False)
    state = trainer.fit(embedding(), blobs(10, 1, 3), 60)  # a NaN would stop it
    assert isinstance(state.model, eqx.nn.MLP)
    before, after = (
        em.evaluate(strategy, model, blobs(5, 2), num_tasks=50)
        for model in (embedding(), state.model)
    )
    assert before.values["accuracy"].shape == (50, 2)
    assert np.isnan(before.mean()[0]) and np.isfinite(after.mean("accuracy")[1])
    assert after.mean("accuracy")[1] > before.mean("accuracy")[1] + 0.02


@pytest.mark.slow
def test_the_evaluation_is_that_of_the_classifier():
    tasks = jax.vmap(blobs(3, 2).sample)(jax.random.split(KEY, 3))
    result = em.evaluate(proto_net(), embedding(), tasks)
    for i in range(3):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        guess = by_hand(embedding(), task.support, task.query[0]).argmax(axis=1)
        accuracy = np.mean(guess == np.asarray(task.query[1]))
        np.testing.assert_allclose(result.values["accuracy"][i, 1], accuracy)


class Pictures(eqx.Module):
    """Features that are no vector, with dropout."""

    dropout: eqx.nn.Dropout
    scale: jax.Array

    def __call__(self, x, *, key=None):
        return self.scale * self.dropout(x, key=key, inference=key is None).reshape(2, 2)


@pytest.mark.slow
def test_features_of_any_shape_and_dropout():
    model = Pictures(eqx.nn.Dropout(0.5), jnp.ones(()))
    task = blobs(3, 2).sample(KEY)
    strategy = proto_net()
    tasks = jax.tree.map(lambda x: x[None], task)
    updates = [
        strategy.outer_update(strategy.init(model), tasks, key=key)
        for key in (None, KEY, jax.random.key(1))
    ]
    assert all(float(state.model.scale) != 1 for state, _ in updates)
    assert len({float(metrics["loss"]) for _, metrics in updates}) == 3
    classifier = strategy.inner_adapt(model, task.support)
    expected = by_hand(lambda x: x, task.support, task.query[0])
    np.testing.assert_allclose(jax.vmap(classifier)(task.query[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ways", "labels"), [(2, [0, 2]), (2, [0, -1]), (None, [0, -1])])
def test_a_label_without_a_class_gives_no_plausible_classifier(ways, labels):
    support = jnp.ones((2, 4)), jnp.array(labels)
    classifier = proto_net(ways=ways).inner_adapt(embedding(), support)
    assert jnp.isnan(classifier(jnp.ones(4))).all()


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_tasks_and_arguments_are_named():
    x = jnp.zeros((2, 4))
    for support, error in [
        (x, TypeError),
        ((x, jnp.zeros((2, 1), int)), ValueError),
        ((x, jnp.zeros(2)), TypeError),
        ((x[:0], jnp.zeros(0, int)), ValueError),
        ((x, jnp.array([0, 1, 0])), ValueError),
        ((jnp.zeros((4, 4)), jnp.array([0, 1])), ValueError),
    ]:
        with pytest.raises(error, match="`support`" + THREE_PARTS):
            proto_net().inner_adapt(embedding(), support)
    with pytest.raises(ValueError, match=r"`ProtoNet\(ways=...\)`" + THREE_PARTS):
        proto_net(ways=0)
    with pytest.raises(TypeError, match=r"`ProtoNet\(loss=...\)`" + THREE_PARTS):
        em.ProtoNet("cross-entropy", optax.sgd(1.0))
    with pytest.raises(ValueError, match="inner_steps" + THREE_PARTS):
        em.evaluate(proto_net(), embedding(), blobs(3, 2), inner_steps=3)


@pytest.mark.slow
def test_queries_are_normalised_by_the_support_set():
    class Normed(eqx.Module):
        norm: em.nn.SupportNorm

        def __call__(self, x):
            return self.norm(x)

    task, model = blobs(3, 2).sample(KEY), Normed(em.nn.SupportNorm(4))
    classifier = proto_net().inner_adapt(model, task.support)
    x = np.asarray(task.support[0], np.float64)

    def normalised(q):
        return (q - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)

    expected = by_hand(normalised, task.support, task.query[0])
    one_by_one = [classifier(q) for q in task.query[0]]
    np.testing.assert_allclose(np.stack(one_by_one), expected, rtol=1e-3, atol=1e-4)


COSINE = [
    [0.48112522432468807, 0.7542530330036967, 0.4082482904638631],
    [0.7139328934618737, 0.07745482614878355, -0.2672612419124244],
    [-0.41996052556580804, 0.1355459457603712, 0.7126966450997985],
]
EUCLIDEAN = [
    [-2.3979157616563596, -1.8540496217739157, -2.449489742783178],
    [-1.8708286933869707, -3.491060010942235, -3.774917217635375],
    [-4.123105625617661, -3.3819373146171707, -1.8027756377319946],
]


def test_the_scores_of_easyfsl(x64):
    """Cosine scores are its `SimpleShot`'s, times the scale; those of `PrototypicalNetworks` are
    minus a distance that is not squared."""
    model, support = Pictures(eqx.nn.Dropout(0.0), jnp.ones(())), (jnp.asarray(SUPPORT), LABELS)
    for options, expected in (
        ({"distance": "cosine"}, 10 * np.array(COSINE)),
        ({"distance": "euclidean"}, -np.square(EUCLIDEAN)),
        ({"distance": lambda a, b: jnp.sqrt(jnp.sum((a - b) ** 2))}, EUCLIDEAN),
    ):
        strategy = proto_net(ways=3, **options)
        learnt = strategy.init(model).model
        found = answers(strategy, learnt, support, jnp.asarray(QUERIES))
        np.testing.assert_allclose(found, expected, rtol=1e-10)


class Mahalanobis(eqx.Module):
    """A distance of one's own, with what is learnt of it."""

    log_factors: jax.Array

    def __call__(self, a, b):
        return jnp.sum(jnp.exp(self.log_factors) * (a - b) ** 2)


@pytest.mark.parametrize(
    "distance",
    [pytest.param("cosine", marks=pytest.mark.slow), Mahalanobis(jnp.zeros(3))],
)
def test_a_learnt_distance_is_learnt(distance, x64):
    """With the embedding, along the meta-gradient of a loss written in NumPy."""
    task, strategy = task_of(5), proto_net(distance=wide(distance))
    x, y = task.query
    smooth = eqx.tree_at(lambda m: m.activation, wide(embedding()), jnp.tanh)

    def forward(model, x):
        first, last = model.layers
        return np.tanh(np.asarray(x) @ first.weight.T + first.bias) @ last.weight.T + last.bias

    def loss(learnt):
        features, queries = forward(learnt.model, task.support[0]), forward(learnt.model, x)
        means = np.stack([features[np.equal(LABELS, k)].mean(axis=0) for k in range(3)])
        if distance == "cosine":
            unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
            logits = np.exp(learnt.extra.log_scale) * unit(queries) @ unit(means).T
        else:
            squares = (queries[:, None] - means[None]) ** 2
            logits = -squares @ np.exp(learnt.extra.log_factors)
        chosen = logits[np.arange(len(y)), np.asarray(y)]
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen)

    along(strategy, smooth, task, loss)


def test_padding_is_nothing_to_a_cosine(x64):
    """Classes that are not there have a prototype of norm zero."""
    assert_padding_is_nothing(proto_net(distance="cosine"), wide(embedding()), task_of(3))


def test_the_distance_that_is_not_learnt_changes_no_bit():
    task = blobs(3, 2).sample(KEY)
    by_name, by_function = (
        proto_net(**options).inner_adapt(embedding(), task.support)
        for options in ({}, {"distance": lambda a, b: jnp.sum((a - b) ** 2)})
    )
    x = task.query[0]
    before = -jnp.sum((jax.vmap(embedding())(x)[:, None] - by_name.prototypes[None]) ** 2, axis=2)
    for classifier in (by_name, by_function):
        assert tree_allclose(jax.vmap(classifier)(x), before, rtol=0, atol=0)
    assert isinstance(proto_net().init(embedding()).model, eqx.nn.MLP)
