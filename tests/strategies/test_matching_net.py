"""Matching networks, against the paper's equation in NumPy and against easyfsl."""

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
    outer_step,
    softmax,
    task_of,
    wide,
)

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
PLAIN = {"distance": lambda a, b: -optax.losses.cosine_similarity(a, b)}  # the paper's: no scale


def matching_net(outer=None, **options) -> em.MatchingNet:
    return em.MatchingNet(em.losses.cross_entropy, outer or optax.sgd(1.0), **options)


MATCHING_NET = matching_net()  # one, so that its programs are compiled once


def embedding() -> eqx.nn.MLP:
    return eqx.nn.MLP(4, 3, 8, 1, activation=jnp.tanh, key=KEY)


def features(model: eqx.nn.MLP, x) -> np.ndarray:
    first, last = model.layers
    hidden = np.tanh(np.asarray(x) @ np.asarray(first.weight).T + np.asarray(first.bias))
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def by_hand(model, scale, support, x) -> np.ndarray:
    """Equation 1, example by example: `p(y = k | x)`, `[examples, ways]`."""
    (of_support, labels), of_queries = (features(model, support[0]), support[1]), features(model, x)
    rows = []
    for q in of_queries:
        cosine = [q @ f / np.sqrt((q @ q) * (f @ f)) for f in of_support]
        attention = np.exp(scale * np.array(cosine))
        attention = attention / attention.sum()
        rows.append([attention[np.asarray(labels) == k].sum() for k in range(max(labels) + 1)])
    return np.array(rows)


class Identity(eqx.Module):
    factor: jax.Array

    def __call__(self, x):
        return self.factor * x


def test_the_probabilities_of_easyfsl(x64):
    """With features of unit length and no context, its `exp(...)` less the 1e-6 that it adds."""
    expected = [
        [0.3606073932922769, 0.46735717544502126, 0.17203843126270188],
        [0.5730284179058475, 0.31551220842895855, 0.1114623736651939],
        [0.2450101863189652, 0.39694971542215435, 0.3580430982588805],
    ]
    support = jnp.asarray(SUPPORT), jnp.asarray(LABELS)
    found = answers(matching_net(**PLAIN), Identity(jnp.ones(())), support, jnp.asarray(QUERIES))
    np.testing.assert_allclose(softmax(found)[:, :3], np.array(expected) - 1e-6, rtol=1e-10)


@pytest.mark.parametrize(
    "labels", [pytest.param([2, 0, 2, 1, 2], marks=pytest.mark.slow), [0, 3, 3, 0, 0]]
)
def test_probabilities_against_the_equation(labels, x64):
    """Unbalanced and unsorted; with classes that are not there; with the scale that is learnt."""
    task, strategy, model = task_of(1, np.array(labels)), MATCHING_NET, wide(embedding())
    learnt = strategy.init(model).model
    assert isinstance(learnt, em.MetaParameters)
    for scale in (10.0, 2.5):
        one = eqx.tree_at(lambda m: m.extra.log_scale, learnt, jnp.log(scale))
        logits = answers(strategy, one, task.support, task.query[0])
        expected = by_hand(model, scale, task.support, task.query[0])
        ways = expected.shape[1]
        np.testing.assert_allclose(softmax(logits)[:, :ways], expected, rtol=1e-10)
        assert logits.shape == (6, 5)  # in a compiled program the labels are not known
        assert np.isneginf(logits[:, ways:]).all()
        assert np.isneginf(logits[:, :ways][:, expected[0] == 0]).all()
    classifier = strategy.inner_adapt(one, task.support)
    assert classifier(task.query[0][0]).shape == (max(labels) + 1,)


def test_the_outer_step_descends_the_equation(x64):
    task = task_of(2)
    x, y = task.query

    def loss(learnt):
        p = by_hand(learnt.model, np.exp(learnt.extra.log_scale), task.support, x)
        return -np.mean(np.log(p[np.arange(len(y)), y]))

    along(MATCHING_NET, wide(embedding()), task, loss)


def test_padding_is_nothing(x64):
    assert_padding_is_nothing(MATCHING_NET, wide(embedding()), task_of(3))


@pytest.mark.slow
def test_weights_are_those_of_the_attention(x64):
    """An example of weight 2 is one that is there twice."""
    task, strategy, model = task_of(4), matching_net(**PLAIN), wide(embedding())
    x, y = task.support
    twice = jnp.concatenate([x, x[:2]]), jnp.concatenate([y, y[:2]])
    weighted = x, y, jnp.array([2.0, 2.0, 1.0, 1.0, 1.0])
    found, expected = (answers(strategy, model, s, task.query[0]) for s in (weighted, twice))
    np.testing.assert_allclose(found[:, :3], expected[:, :3], rtol=1e-12)


def test_every_example_counts_by_itself():
    """Two classes of the same mean, which no prototype tells apart; of one shot both are one."""
    x = jnp.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    support, query = (x, jnp.array([0, 0, 1, 1])), (0.9 * x, jnp.array([0, 0, 1, 1]))
    model, options = Identity(jnp.ones(())), {"distance": "euclidean"}
    proto_net = em.ProtoNet(em.losses.cross_entropy, optax.sgd(1.0))
    ours, theirs = (
        np.argmax(answers(strategy, model, support, query[0]), axis=1)
        for strategy in (matching_net(**options), proto_net)
    )
    assert np.array_equal(ours, [0, 0, 1, 1]) and np.array_equal(theirs, [0, 0, 0, 0])
    one_shot = x[:2], jnp.array([1, 0])
    ours, theirs = (
        answers(strategy, model, one_shot, query[0])
        for strategy in (matching_net(**options), proto_net)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.slow
def test_examples_far_away_leave_finite_gradients():
    """Where `exp(-d)` is zero in float32, its logarithm is not."""
    strategy, model = matching_net(distance="euclidean"), Identity(jnp.ones(()))
    x = jnp.array([[0.0], [30.0]])
    task = em.Task((x, jnp.array([0, 1])), (x, jnp.array([1, 0])))
    _, metrics = outer_step(strategy, strategy.init(model), task)
    np.testing.assert_allclose(metrics["loss"], 900, rtol=1e-6)
    assert np.isfinite(metrics["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize(("ways", "labels"), [(2, [0, 2]), (None, [0, -1])])
def test_a_label_without_a_class_gives_no_plausible_classifier(ways, labels):
    strategy = matching_net(ways=ways, **PLAIN)
    support = jnp.ones((2, 4)), jnp.array(labels)
    assert np.isnan(answers(strategy, embedding(), support, jnp.ones((1, 4)))).all()


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`MatchingNet\(ways=...\)`" + THREE_PARTS):
        matching_net(ways=0)
    for distance in ("manhattan", 3, eqx.nn.Linear):
        with pytest.raises(ValueError, match=r"`MatchingNet\(distance=...\)`" + THREE_PARTS):
            matching_net(distance=distance)
    with pytest.raises(TypeError, match="is not all that `MatchingNet` learns" + THREE_PARTS):
        matching_net().inner_adapt(embedding(), (jnp.ones((2, 4)), jnp.array([0, 1])))
