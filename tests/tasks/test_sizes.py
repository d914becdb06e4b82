"""Episodes whose ways, shots and queries are drawn for each task."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from eqxmeta.tasks import Episodes

from ..boring import same_bits

KEYS = jax.random.split(jax.random.key(0), 4000)
SIZES = {"ways": (2, 4), "shots": (1, 3), "queries": (2, 5)}
# Seven classes of eight examples; an example is `[its class, its number]`, no zero among them.
LABELS = np.repeat(np.arange(1, 8), 8)
IMAGES = np.stack([LABELS, np.arange(1, 57)], axis=1).astype(np.float32)


def draw(**options):
    episodes = Episodes(IMAGES, LABELS, **{**SIZES, **options})
    return jax.tree.map(np.asarray, sample(episodes, KEYS)), episodes


@eqx.filter_jit
def sample(episodes, keys):
    return jax.vmap(episodes.sample)(keys)


TASKS, EPISODES = draw()


def sizes():
    """Of all tasks: ways, shots and queries, as the weights say."""
    ways, shots, queries = [], [], []
    for (_, y, w), (_, query_y, query_w) in zip(
        zip(*TASKS.support, strict=True), zip(*TASKS.query, strict=True), strict=True
    ):
        support, query = np.bincount(y[w > 0]), np.bincount(query_y[query_w > 0])
        assert len(set(support)) == len(set(query)) == 1 and len(support) == len(query)
        ways.append(len(support))
        shots.append(support[0])
        queries.append(query[0])
    return np.array(ways), np.array(shots), np.array(queries)


def test_sizes_are_uniform_with_both_ends_and_independent():
    drawn = sizes()
    for sample, (least, most) in zip(drawn, SIZES.values(), strict=True):
        values, counts = np.unique(sample, return_counts=True)
        assert list(values) == list(range(least, most + 1))
        assert stats.chisquare(counts).pvalue > 1e-3
    table = np.zeros((3, 3, 4))
    np.add.at(table, (drawn[0] - 2, drawn[1] - 1, drawn[2] - 2), 1)
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_examples_are_distinct_and_of_their_classes():
    seen = np.zeros(7, int)
    for i in range(500):
        sets = [[leaf[i] for leaf in batch] for batch in (TASKS.support, TASKS.query)]
        x, y, _ = (
            np.concatenate(arrays)
            for arrays in zip(*((x[w > 0], y[w > 0], w) for x, y, w in sets), strict=True)
        )
        assert len(np.unique(x[:, 1])) == len(x)
        classes = {(int(label), int(c)) for label, c in zip(y, x[:, 0], strict=True)}
        ways = y.max() + 1
        assert len(classes) == ways == len({c for _, c in classes})
        seen[[c - 1 for _, c in classes]] += 1
        told = np.asarray(EPISODES.classes(KEYS[i])) if i < 20 else None
        if told is not None:
            expected = np.full(4, -1)
            for label, c in classes:
                expected[label] = c - 1
            assert np.array_equal(told, expected)
    assert stats.chisquare(seen).pvalue > 1e-3


def test_padding_is_weight_zero_label_zero_and_no_image():
    for x, y, w in (TASKS.support, TASKS.query):
        assert set(np.unique(w)) == {0, 1} and w.dtype == np.float32
        assert not x[w == 0].any() and not y[w == 0].any()
        assert x[w == 1].all()
    assert TASKS.support[0].shape == (4000, 4 * 3, 2)
    assert TASKS.query[0].shape == (4000, 4 * 5, 2)


def test_equal_ends_are_the_tasks_of_plain_numbers_with_weights_of_one():
    plain, _ = draw(ways=3, shots=2, queries=4)
    pairs, _ = draw(ways=(3, 3), shots=2, queries=(4, 4))
    for batch, weighted in ((plain.support, pairs.support), (plain.query, pairs.query)):
        assert same_bits(batch, weighted[:2]) and (weighted[2] == 1).all()


def test_padding_is_neither_turned_nor_augmented():
    images = np.arange(1, 57, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    episodes = Episodes(images, LABELS, **SIZES, rotations=True, augment=lambda x, *, key: x + 1)
    task = sample(episodes, KEYS[:1])
    for x, _, w in (task.support, task.query):
        assert (x[w > 0] > 1).all() and not x[w == 0].any()
        assert 0 < jnp.sum(w) < w.size


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ways": (5, 2)}, ValueError, r"`ways`.*\(5, 2\).*least, most"),
        ({"ways": (0, 2)}, ValueError, "`ways`.*1 or more classes a task"),
        ({"shots": (1, 2, 3)}, ValueError, "`shots`.*least, most"),
        ({"shots": (1.0, 2)}, TypeError, "`shots`.*integer"),
        ({"queries": "5"}, TypeError, "`queries`.*integer.*pair"),
        ({"ways": (2, 8)}, ValueError, r"`labels`.*7 classes.*ways=\(2, 8\)"),
        ({"shots": (1, 4)}, ValueError, r"`labels`.*has 8.*9 examples.*shots=\(1, 4\)"),
    ],
)
def test_wrong_sizes_are_named(options, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        Episodes(IMAGES, LABELS, **{**SIZES, **options})
