"""What is made of evaluations: predictions, results per class, comparisons, tables."""

import io
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import eqxmeta as em
from eqxmeta._evaluation.tasks import same_tasks, telling_number

from ..helpers import tiny_mlp

NAMES = ("pear", "fig", "kiwi", "lime")
CENTRES = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.4, 0.4]], np.float32)  # two are close
LEARNER = em.ProtoNet(em.losses.cross_entropy, optax.sgd(0.1))
SINES = em.tasks.Sinusoid(4, 6)


class Fruit(eqx.Module):
    """Three of four clouds of points a task, one support and two query examples of each."""

    names: tuple[str, ...] | None = eqx.field(static=True, default=NAMES)

    def classes(self, key):
        return jax.random.permutation(jax.random.fold_in(key, 7), 4)[:3]

    def sample(self, key):
        centres = jnp.asarray(CENTRES)[self.classes(key)]
        points = centres[:, None] + 0.5 * jax.random.normal(key, (3, 3, 2))
        label = jnp.repeat(jnp.arange(3), 2)
        return em.Task(
            (points[:, 0], jnp.arange(3)), (points[:, 1:].reshape(6, 2), label.astype(jnp.int32))
        )


class Same(eqx.Module):
    """The embedding is the point itself, or a multiple."""

    scale: jax.Array

    def __call__(self, x):
        return self.scale * x


def judged(scale=1.0, *, source=None, **options):
    options = {"num_tasks": 60, "predictions": True} | options
    model = Same(jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (2,)))
    return em.evaluate(LEARNER, model, Fruit() if source is None else source, **options)


@pytest.fixture(scope="module")
def result():
    return judged()


# One of each, so that each is compiled once.
MAML, SLOWER = (
    em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(rate), 2), optax.sgd(0.1))
    for rate in (0.05, 0.01)
)


# Predictions.


def test_predictions_are_those_of_the_adapted_models():
    tasks = jax.vmap(SINES.sample)(jax.random.split(jax.random.key(3), 4))
    found = em.evaluate(MAML, tiny_mlp(), tasks, predictions=True).predictions
    for i in range(4):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        adapted = MAML.inner_adapt(tiny_mlp(), task.support)
        by_hand = [adapted(x) for x in task.query[0]]
        np.testing.assert_allclose(found.outputs[i], by_hand, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found.targets[i], task.query[1])
    assert found.classes is None
    assert em.evaluate(MAML, tiny_mlp(), tasks).predictions is None
    with pytest.raises(ValueError, match="not of classes"):
        _ = found.predicted


def test_predictions_and_accuracy_are_of_the_same_tasks(result):
    found = result.predictions
    right = (found.outputs.argmax(-1) == found.targets).mean(1)
    np.testing.assert_allclose(right, result.values["accuracy"][:, -1], rtol=1e-6)
    assert 0 < right.mean() < 1
    np.testing.assert_array_equal(found.predicted, found.outputs.argmax(-1))


def test_per_class_is_counted_by_hand(result):
    found = result.predictions
    hits, taken = {n: {} for n in range(4)}, {n: [] for n in range(4)}
    for t in range(60):
        for guess, label in zip(found.outputs[t].argmax(-1), found.targets[t], strict=True):
            true = int(found.classes[t, label])
            hits[true].setdefault(t, []).append(guess == label)
            if guess != label:
                taken[true].append(int(found.classes[t, guess]))
    table = result.per_class()
    assert [row.accuracy for row in table.rows] == sorted(row.accuracy for row in table.rows)
    assert {row.name for row in table.rows} == set(NAMES)
    for row in table.rows:
        number = NAMES.index(row.name)
        means = [np.mean(x) for x in hits[number].values()]
        assert row.tasks == len(means) > 30
        assert row.accuracy == pytest.approx(np.mean(means))
        half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
        assert row.ci95 == pytest.approx(half)
        counts = np.bincount(taken[number], minlength=4)
        assert row.taken_for is None or NAMES.index(row.taken_for) == counts.argmax()
        assert row.share == pytest.approx(counts.max() / (2 * len(means)))
    worst = table.rows[0]
    assert {worst.name, worst.taken_for} == {"pear", "lime"}
    assert f"{worst.taken_for} ({worst.share:.1%})" in str(table).splitlines()[2]


def test_padding_is_no_query_and_no_class():
    """Task 0 has two classes and a query of padding; in task 1 a padded one would be wrong."""
    outputs = np.array(
        [[[3, 1, 9], [1, 3, 9], [0, 9, 0]], [[9, 1, 1], [1, 9, 1], [9, 1, 1]]], float
    )
    targets = np.array([[0, 1, 0], [0, 1, 2]])
    weights = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    classes = np.array([[5, 6, 7], [6, 5, 7]])
    made = em.Predictions(outputs, targets, weights, classes)
    np.testing.assert_array_equal(made.predicted, [[0, 1, 1], [0, 1, 0]])
    rows = em.Evaluation({"loss": np.ones((2, 1))}, predictions=made).per_class().rows
    assert [(row.name, row.accuracy, row.tasks) for row in rows] == [("5", 1, 2), ("6", 1, 2)]


def test_the_classes_of_episodes_have_their_names():
    """Images of one colour a class: the source's names, and what the labels really are."""
    images = np.repeat(np.arange(4, dtype=np.float32), 5)[:, None, None] * np.ones(
        (20, 2, 2), np.float32
    )
    source = em.tasks.Episodes(images, np.repeat(NAMES, 5), ways=3, shots=1, queries=2)
    flat = eqx.nn.Lambda(lambda x: x.mean()[None])
    found = em.evaluate(LEARNER, flat, source, num_tasks=20, predictions=True)
    assert {row.name for row in found.per_class().rows} == set(NAMES)
    assert all(row.accuracy == 1 and row.taken_for is None for row in found.per_class().rows)
    assert found.predictions.names == tuple(sorted(NAMES))


def test_a_class_without_a_name_is_its_number_and_nan_is_taken_for_none():
    with pytest.warns(RuntimeWarning, match="NaN for 3 of 3 tasks"):
        rows = judged(np.nan, source=Fruit(None), num_tasks=3).per_class().rows
    assert {row.name for row in rows} <= set("0123")
    assert all(row.accuracy == 0 and row.taken_for is None for row in rows)


def test_per_class_of_what_has_no_classes_is_refused():
    batch = jax.vmap(Fruit().sample)(jax.random.split(jax.random.key(0), 3))
    for options, told in (
        ({"source": batch}, "does not say which class(.|\n)*Episodes"),
        ({"predictions": False}, "without predictions(.|\n)*predictions=True"),
    ):
        with pytest.raises(ValueError, match=told):
            judged(**options).per_class()


def test_predictions_want_pairs():
    class Alone(eqx.Module):
        def sample(self, key):
            x = jax.random.normal(key, (3, 1))
            return em.Task(x, x)

    with pytest.raises(ValueError, match=r"evaluate\(predictions=...\)`(.|\n)*`\(x, y\)`"):
        em.evaluate(MAML, tiny_mlp(), Alone(), predictions=True)


# Comparisons.


def test_the_interval_is_that_of_the_paired_t_test():
    a, b = (em.evaluate(s, tiny_mlp(), SINES, num_tasks=40) for s in (MAML, SLOWER))
    expected = stats.ttest_rel(a.values["loss"][:, -1], b.values["loss"][:, -1])
    interval = expected.confidence_interval(0.95)
    found = em.compare(a, b)
    assert found.mean == pytest.approx((interval.low + interval.high) / 2, rel=1e-5)
    assert found.ci95 == pytest.approx((interval.high - interval.low) / 2, rel=1e-5)
    assert found.significant == (expected.pvalue < 0.05)
    assert found.ci95 < a.ci95()[-1]  # tasks that are hard for one are hard for the other
    assert em.compare(b, a).mean == -found.mean
    told = f"loss: a - b = {found.mean:+.4g} ± {found.ci95:.2g} over 40 tasks"
    assert repr(found) == f"{told}, {'' if found.significant else 'not '}significant"


def test_the_accuracy_is_compared_where_there_is_one(result):
    same = em.compare(result, result)
    assert (same.metric, same.mean, same.ci95, same.significant) == ("accuracy", 0, 0, False)
    assert em.compare(result, result, "loss").metric == "loss"
    with pytest.raises(KeyError, match="'f1'"):
        em.compare(result, result, "f1")


def test_evaluations_on_different_tasks_are_not_compared(result):
    class Other(Fruit):
        def classes(self, key):
            return super().classes(jax.random.fold_in(key, 1))

    by_hand = em.Evaluation(result.values)
    for other, told in (
        (judged(num_tasks=59), "num_tasks 60 and 59"),
        (judged(seed=1), "seed 0 and 1"),
        (judged(source=Other()), "another source"),
        (by_hand, "not known on which tasks"),
    ):
        with pytest.raises(ValueError, match=rf"`compare\(a, b\)` is of different(.|\n)*{told}"):
            em.compare(result, other)
    with pytest.raises(ValueError, match="'x' and 'y' with seed 0 and 1"):
        em.leaderboard({"x": result, "y": judged(seed=1)})


def test_tasks_are_known_again_whoever_computes_them(result):
    """By another strategy, in 64 bits, and given as a batch."""
    maml = em.MAML(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    other = em.evaluate(maml, linear, Fruit(), num_tasks=60)
    assert em.compare(result, other).differences.shape == (60,)
    root = jax.random.fold_in(jax.random.key(0), 0x6576616C)
    keys = [jax.random.split(jax.random.fold_in(root, i))[0] for i in range(60)]
    batch = jax.vmap(Fruit().sample)(jnp.stack(keys))
    assert em.compare(result, judged(source=batch, seed=5)).mean == pytest.approx(0, abs=1e-6)
    drawn_otherwise = jax.tree.map(lambda x: x[::-1], batch)
    with pytest.raises(ValueError, match="different tasks"):
        em.compare(result, judged(source=drawn_otherwise))


# The table.


def made(*means, n=50, **options):
    """Evaluations whose values are the means, a common noise, and a little of their own."""
    rng = np.random.default_rng(0)
    common, tells = rng.normal(0, 0.2, n), rng.normal(size=n)
    values = [m + common + rng.normal(0, 0.01, n) for m in means]
    return [em.Evaluation({"accuracy": v[:, None]}, tasks=tells, **options) for v in values]


def test_the_leaderboard_marks_what_is_not_significantly_worse():
    """Of three, the second is as good as the first by pairs; the third is not, though its own
    interval is six times as wide as the distance."""
    results = dict(zip(("low", "high", "same"), made(0.69, 0.70, 0.70), strict=True))
    board = em.leaderboard(results)
    assert {place.name for place in board.places if place.best} == {"high", "same"}
    first, _, last = board.places
    assert last.name == "low" and first.behind is None
    against = stats.ttest_rel(
        results["low"].values["accuracy"][:, 0], results[first.name].values["accuracy"][:, 0]
    ).confidence_interval(0.95)
    assert last.behind.mean + last.behind.ci95 == pytest.approx(against.high)
    assert last.behind.mean - last.behind.ci95 == pytest.approx(against.low)
    lines = str(board).splitlines()
    assert lines[0].split() == ["accuracy", "to", "the", "best"]
    assert lines[4].startswith("low  ") and lines[5].startswith("Marked *: the best, and what is")
    mean, half = 100 * results["low"].mean("accuracy")[-1], 100 * last.ci95
    assert f"{mean:.2f} ± {half:.2f} %" in lines[4]
    rows = board.markdown().splitlines()
    assert rows[1] == "| --- | ---: | ---: |" and rows[4].startswith("| low | ")
    assert (
        "significantly the best"
        in em.leaderboard(dict(zip("ab", made(0.5, 0.7), strict=True))).markdown()
    )


def test_which_way_the_metric_improves():
    results = {"a": em.evaluate(MAML, tiny_mlp(), SINES, num_tasks=40)}
    results["b"] = em.evaluate(SLOWER, tiny_mlp(), SINES, num_tasks=40)
    board = em.leaderboard(results)
    assert board.metric == "loss" and board.places[0].mean < board.places[1].mean
    strange = [em.Evaluation({"f1": np.ones((3, 1)) * k}, tasks=np.arange(3.0)) for k in (1, 2)]
    boards = dict(zip("ab", strange, strict=True))
    with pytest.raises(ValueError, match="nobody says which way"):
        em.leaderboard(boards, "f1")
    assert em.leaderboard(boards, "f1", mode="max").places[0].name == "b"
    told = {
        k: em.Evaluation(x.values, tasks=x.tasks, directions={"f1": "min"})
        for k, x in boards.items()
    }
    assert em.leaderboard(told, "f1").places[0].name == "a"
    with pytest.raises(ValueError, match="one or more results"):
        em.leaderboard({})


def test_what_is_transductive_or_nan_is_seen():
    bad, good = made(0.9, 0.5)
    bad.values["accuracy"][3] = np.nan
    strange = em.Evaluation(good.values, True, good.tasks)
    board = em.leaderboard({"bad": bad, "good": good, "strange": strange})
    assert [place.name for place in board.places] == ["good", "strange", "bad"]
    assert [row[0] for row in board.cells()[1:]] == ["good *", "strange (transductive) *", "bad"]
    assert not board.places[-1].best
    assert "no verdict: NaN in 1 of them" in repr(em.compare(good, bad))


def test_tasks_of_which_some_hold_nan_are_known_again():
    tells = [telling_number(em.Task(jnp.array([x, y]), ())) for x, y in ((1, 2), (1, np.nan))]
    tells = np.asarray(tells)
    assert same_tasks(tells, tells) and not same_tasks(tells, tells[::-1])


# Sources on the host, and what is seen meanwhile.


class OnHost:
    """Batches of four tasks."""

    def __getitem__(self, step):
        if step > 2:
            raise IndexError(step)
        keys = jax.random.split(jax.random.key(step), 4)
        return jax.tree.map(np.asarray, jax.vmap(SINES.sample)(keys))


def test_a_host_source_is_evaluated_in_its_order():
    result = em.evaluate(MAML, tiny_mlp(), OnHost(), num_tasks=10, predictions=True)
    batches = [OnHost()[i] for i in range(3)]
    batch = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
    expected = em.evaluate(MAML, tiny_mlp(), batch)
    np.testing.assert_allclose(result.values["loss"], expected.values["loss"][:10], rtol=1e-5)
    assert result.predictions.targets.shape == (10, 6, 1)
    with pytest.raises(ValueError, match=r"`evaluate\(tasks=...\)\[3\]` does not exist"):
        em.evaluate(MAML, tiny_mlp(), OnHost(), num_tasks=13)


def test_labels_without_a_logit_are_told_of_a_host_source_too():
    def batch(step):
        x = np.random.default_rng(step).normal(size=(2, 3, 5)).astype(np.float32)
        y = np.tile(np.arange(3, dtype=np.int32), (2, 1)) + (step == 1)
        return em.Task((x, y), (x, y))

    linear = eqx.nn.Linear(5, 3, key=jax.random.key(0))
    strategy = em.MAML(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    with pytest.warns(RuntimeWarning, match=r"NaN for 2 of 4(.|\n)*from 1 to 3, of task 2"):
        em.evaluate(strategy, linear, [batch(0), batch(1)], num_tasks=4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_takes_long_shows_a_bar_in_a_terminal(monkeypatch):
    def shown(seconds):
        monkeypatch.setattr("eqxmeta._bar._SECONDS", seconds)
        monkeypatch.setattr("sys.stderr", Terminal())
        em.evaluate(MAML, tiny_mlp(), SINES, num_tasks=120)
        return sys.stderr.getvalue()

    assert "/120 [" in shown(0.0)
    assert shown(1000.0) == ""
