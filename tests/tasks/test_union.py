"""Tasks of several sources."""

import jax
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.tasks import Episodes, Minibatches, Sinusoid, Union

from .test_episodes import assert_chi_square, coded, draw

THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


def valued(value: float, **options) -> Episodes:
    """Tasks that say of which source they are."""
    options = {"ways": 2, "shots": 1, "queries": 1, **options}
    return Episodes(np.full((6, 2), value, np.float32), [0, 0, 0, 1, 1, 1], **options)


@pytest.mark.parametrize("weights", [None, [3, 1, 0], (0.2, 0.2, 0.6)])
def test_tasks_are_of_each_source_by_its_weight(weights):
    union = Union(valued(0), valued(1), valued(2), weights=weights)
    task = draw(union, 4000)
    number = np.asarray(task.support[0])[:, 0, 0].astype(int)
    assert (np.asarray(task.query[0]) == number[:, None, None]).all()
    share = np.ones(3) if weights is None else np.asarray(weights)
    expected = 4000 * share / share.sum()
    counts = np.bincount(number, minlength=3)
    assert_chi_square(counts[expected > 0], expected[expected > 0])
    assert counts[expected == 0].sum() == 0


def test_a_task_is_that_of_a_source_and_depends_on_its_key_alone():
    union = Union(Episodes(*coded([4, 4, 4]), 2, 1, 2), valued(9, queries=2))
    together = draw(union, 20)
    sample = jax.jit(lambda key: union.sample(key))  # not under `vmap`: a real branch
    for i, key in enumerate(jax.random.split(jax.random.key(0), 20)):
        alone = sample(key)
        for one, all_of_them in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.array_equal(one, all_of_them[i])
        of_second = np.asarray(alone.pooled[0]) == 9
        assert of_second.all() or not of_second.any()


def test_a_union_is_trained_on():
    union = Union(Sinusoid(5, 5), Sinusoid(5, 5, amplitude=(1, 1)), weights=[1, 2])
    inner = em.InnerLoop(optax.sgd(0.01), steps=1)
    strategy = em.MAML(em.losses.mse, inner, optax.sgd(0.01))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=False)
    model = em.nn.Linear(1, 1, key=jax.random.key(0))
    assert int(trainer.fit(model, union, 2).step) == 2


def test_tasks_of_other_shapes_are_told_apart():
    with pytest.raises(ValueError, match=r"`Union\(sources\[1\]\)` differ" + THREE_PARTS) as caught:
        Union(valued(0), valued(1, queries=2))
    assert "query[0]: float32[2, 2], float32[4, 2]" in str(caught.value)
    assert "support" not in str(caught.value)
    batches = Minibatches(np.zeros((4, 2), np.float32), [0, 0, 1, 1], 2)
    with pytest.raises(ValueError, match="differ" + THREE_PARTS):
        Union(valued(0), batches)
    assert draw(Union(batches, batches), 2).support == ()


@pytest.mark.parametrize(
    ("sources", "weights", "error", "said"),
    [
        ((valued(0),), None, ValueError, "too few"),
        ((valued(0), 3), None, TypeError, r"`Union\(sources\[1\]\)` is not a task source"),
        ((valued(0), valued(1)), [1], ValueError, "`weights`"),
        ((valued(0), valued(1)), [1, -1], ValueError, "`weights`"),
        ((valued(0), valued(1)), [0, 0], ValueError, "`weights`"),
        ((valued(0), valued(1)), [1, np.inf], ValueError, "`weights`"),
        ((valued(0), valued(1)), ["a", "b"], TypeError, "`weights`"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_are_named(sources, weights, error, said):
    with pytest.raises(error, match=said + r"(.|\n)*\nReceived: (.|\n)+\nExpected: "):
        Union(*sources, weights=weights)
