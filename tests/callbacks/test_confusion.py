import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from jaxtyping import Array

import eqxmeta as em
from eqxmeta._evaluation.plot_confusion import confusion_matrix
from eqxmeta.callbacks import AdaptationPlot, Confusion, TensorBoard

from ..boring import boring_fit
from ..fake_run import fake_run
from ..helpers import tiny_mlp

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 1, 4, 4), np.uint8)
FRUIT = [f"fruit{number}" for number in range(6)]
TASKS = em.tasks.Episodes(IMAGES, np.repeat(FRUIT, 4), ways=3, shots=1, queries=3)


class Flat(eqx.Module):
    """`[channels, 4, 4] -> [3]` logits."""

    linear: eqx.nn.Linear

    def __init__(self, key, channels=1):
        self.linear = eqx.nn.Linear(16 * channels, 3, key=key)

    def __call__(self, image: Array) -> Array:
        return self.linear(image.ravel())


MODEL = Flat(jax.random.key(0))


@pytest.fixture(scope="module")
def strategy():
    inner = em.InnerLoop(optax.sgd(0.5), steps=1)
    return em.MAML(em.losses.cross_entropy, inner=inner, optimizer=optax.adam(1e-3))


class Still(em.GradientStrategy):
    """Adapts nothing."""

    loss: em.Loss
    optimizer: optax.GradientTransformation

    def inner_adapt(self, model, support, *, key=None):
        return model


class Heard(list):
    def on_log(self, run, scalars):
        self.append((run.step, scalars))


def counted(figure, classes=3):
    """The matrix as it stands in the figure: an empty cell is a zero."""
    matrix = np.zeros((classes, classes), int)
    for text in figure.axes[1].texts:
        column, row = text.get_position()
        matrix[row, column] = int(text.get_text())
    return matrix


def expected_predictions(strategy, seed, num_tasks, steps):
    """Task by task, outside of any compiled loop; the predictions in NumPy."""
    sample = eqx.filter_jit(TASKS.sample)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, s: strategy.loss(m, s, None)[0]))
    for key in jax.random.split(jax.random.key(seed), num_tasks):
        task = sample(key)
        adapted = MODEL
        for _ in range(steps):  # plain gradient descent at the inner rate
            grads = gradient(adapted, task.support)
            adapted = jax.tree.map(lambda p, g: p - 0.5 * g, adapted, grads)
        weight, bias = np.asarray(adapted.linear.weight), np.asarray(adapted.linear.bias)
        logits = np.asarray(task.query[0]).reshape(9, 16) @ weight.T + bias
        yield task, np.argmax(logits, axis=1).tolist(), np.asarray(TASKS.classes(key)).tolist()


@pytest.mark.parametrize(("num_tasks", "inner_steps"), [(1, None), (4, 3)])
def test_the_matrix_counts_what_adapted_models_predict(strategy, num_tasks, inner_steps):
    figure = em.plot_confusion(
        strategy, MODEL, TASKS, num_tasks=num_tasks, inner_steps=inner_steps, seed=3
    )
    matrix, tasks, met = np.zeros((6, 6), int), [], set()
    for task, predicted, classes in expected_predictions(strategy, 3, num_tasks, inner_steps or 1):
        tasks.append((task, predicted, classes))
        met |= set(classes)
        for label, guess in zip(task.query[1].tolist(), predicted, strict=True):
            matrix[classes[label], classes[guess]] += 1
    # The rows of one task are its own; of several they are the classes of the source.
    shown = tasks[0][2] if num_tasks == 1 else sorted(met)
    matrix = matrix[np.ix_(shown, shown)]
    assert np.array_equal(counted(figure, len(shown)), matrix) and matrix.sum() == 9 * num_tasks
    ticks = [tick.get_text().split()[-1] for tick in figure.axes[1].get_yticklabels()]
    assert ticks == [f"fruit{c}" for c in shown]
    rows = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert rows == [f"{label} fruit{c}" for label, c in enumerate(tasks[0][2])]
    assert f"{np.trace(matrix) / matrix.sum():.1%} of {9 * num_tasks}" in figure.get_suptitle()
    # The first task is the one that is shown: wrong predictions, by row, under their class.
    task, predicted, _ = tasks[0]
    labels = task.query[1].tolist()
    wrong = sorted((c, str(p)) for c, p in zip(labels, predicted, strict=True) if p != c)
    texts = figure.axes[0].texts
    assert sorted((int(t.get_position()[1]), t.get_text()) for t in texts) == wrong
    shown = [image.get_array() for image in figure.axes[0].get_images()]
    assert len(shown) == 12 and len(figure.axes[0].patches) == 12
    pixels = np.concatenate([task.support[0], task.query[0]])[:, 0]
    scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    assert all(np.isclose(scaled, image, atol=1e-6).all((1, 2)).any() for image in shown)


class Normalised(eqx.Module):
    """With the statistics of whatever is predicted together."""

    norm: em.nn.BatchNorm
    flat: Flat

    def __call__(self, image: Array) -> Array:
        return self.flat(self.norm(image))


def test_queries_that_are_normalised_together():
    still = Still(em.losses.cross_entropy, optax.sgd(0.1))
    figure = em.plot_confusion(still, Normalised(em.nn.BatchNorm(1), MODEL), TASKS, seed=3)
    (key,) = jax.random.split(jax.random.key(3), 1)
    x, y = map(np.asarray, eqx.filter_jit(TASKS.sample)(key).query)
    normalised = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    weight, bias = np.asarray(MODEL.linear.weight), np.asarray(MODEL.linear.bias)
    predicted = np.argmax(normalised.reshape(9, 16) @ weight.T + bias, axis=1)
    assert len(set(predicted)) > 1
    assert np.array_equal(counted(figure), confusion_matrix(y, predicted, 3))


@pytest.mark.slow
def test_of_tasks_of_several_sizes_what_is_there_is_counted():
    """By a model that sees the last class in everything, which not every task has."""
    sizes = {"ways": (2, 3), "shots": (1, 2), "queries": (1, 2)}
    tasks = em.tasks.Episodes(IMAGES, np.repeat(np.arange(6), 4), **sizes)
    last = eqx.tree_at(lambda m: m.linear.bias, MODEL, jnp.array([0.0, 0.0, 99.0]))
    still = Still(em.losses.cross_entropy, optax.sgd(0.1))
    figure = em.plot_confusion(still, last, Unnamed(tasks), num_tasks=6, seed=3)
    keys = jax.random.split(jax.random.key(3), 6)
    drawn = [jax.tree.map(np.asarray, eqx.filter_jit(tasks.sample)(key)) for key in keys]
    queries = [int(task.query[2].sum()) for task in drawn]
    assert len(set(queries)) > 1
    matrix = counted(figure)
    assert matrix.sum() == sum(queries)
    ways = [int(task.support[1].max()) + 1 for task in drawn]
    assert set(ways) == {2, 3}
    of_three = sum(n for n, way in zip(queries, ways, strict=True) if way == 3)
    assert matrix[:, 2].sum() == of_three and matrix[2].sum() == of_three // 3
    assert len(figure.axes[0].patches) == drawn[0].support[2].sum() + queries[0]
    # The same by class, of which the last one is another in each task.
    expected = np.zeros((6, 6), int)
    for key, task, way in zip(keys, drawn, ways, strict=True):
        classes = np.asarray(tasks.classes(key))
        assert (classes[way:] == -1).all()
        for label in task.query[1][task.query[2] > 0]:
            expected[classes[label], classes[way - 1]] += 1
    by_class = em.plot_confusion(still, last, tasks, num_tasks=6, seed=3)
    assert set(np.flatnonzero(expected.sum(1))) == set(range(6))
    assert np.array_equal(counted(by_class, 6), expected)


@pytest.mark.parametrize(
    ("path", "error"),
    [("folder", IsADirectoryError), ("file/a.png", NotADirectoryError)],
)
def test_a_path_that_cannot_be_a_file_is_refused_before_the_run(tmp_path, path, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for callback in (
        Confusion(TASKS, tmp_path / path),
        AdaptationPlot(em.tasks.Sinusoid(2, 2), tmp_path / path),
    ):
        with pytest.raises(error, match=rf"{type(callback).__name__}\(path="):
            boring_fit(2, callbacks=[callback])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_confusion_matrix_against_its_definition():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, (2, 50))
    matrix = confusion_matrix(labels, predicted, 4)
    for i, j in np.ndindex(4, 4):
        assert matrix[i, j] == sum((labels == i) & (predicted == j))


def test_a_model_of_more_classes_than_the_task():
    """Predictions of classes that the task does not have are columns of their own."""
    found = confusion_matrix(np.array([0, 0, 1]), np.array([0, 3, 1]), ways=2)
    assert found.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]


class Broken(eqx.Module):
    """NaN for images whose first pixel is dark."""

    flat: Flat

    def __call__(self, image: Array) -> Array:
        return self.flat(image) + jnp.where(image[0, 0, 0] < 0.5, jnp.nan, 0.0)


class Unnamed(eqx.Module):
    """A source that does not say what its labels stand for."""

    tasks: em.tasks.Episodes

    def sample(self, key):
        return self.tasks.sample(key)


@pytest.mark.slow
def test_classes_without_names_and_too_many_of_them():
    still = Still(em.losses.cross_entropy, optax.sgd(0.1))
    labels = np.repeat([f"a class with a rather long name {n:02}" for n in range(24)], 2)
    images = np.random.default_rng(1).integers(0, 256, (48, 1, 4, 4), np.uint8)
    many = em.tasks.Episodes(images, labels, ways=3, shots=1, queries=1)
    for tasks, rows in ((Unnamed(TASKS), ["0", "1", "2"]), (many, ["0 a class with a…g name 0"])):
        figure = em.plot_confusion(still, MODEL, tasks, num_tasks=40)
        shown = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert shown == rows or (shown[0][:-1] == rows[0] and len(shown[0]) == 26)
        ticks = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
        assert ticks == ["0", "1", "2"] and counted(figure).sum() == 40 * len(tasks.sample(
            jax.random.key(0)).query[1])  # fmt: skip


def test_what_is_no_number_is_taken_for_none():
    still = Still(em.losses.cross_entropy, optax.sgd(0.1))
    figure = em.plot_confusion(still, Broken(MODEL), TASKS, seed=3)
    (key,) = jax.random.split(jax.random.key(3), 1)
    x, y = map(np.asarray, eqx.filter_jit(TASKS.sample)(key).query)
    dark = x[:, 0, 0, 0] < 0.5
    assert 0 < dark.sum() < 9
    predicted = np.where(dark, -1, jax.vmap(MODEL)(x).argmax(axis=1))
    images, matrix = figure.axes
    columns = [tick.get_text() for tick in matrix.get_xticklabels()]
    assert [column[:2] for column in columns] == ["0 ", "1 ", "2 ", "no"]
    counts = {t.get_position(): int(t.get_text()) for t in matrix.texts}
    for label in range(3):
        assert counts.get((3, label), 0) == (dark & (y == label)).sum()
    assert sum(counts.values()) == 9
    assert [t.get_text() for t in images.texts].count("none") == dark.sum()
    assert f"{np.mean(predicted == y):.1%} of 9" in figure.get_suptitle()
    assert confusion_matrix(y, predicted, 3)[:, 3].sum() == dark.sum()


@pytest.mark.slow
def test_publishes_at_the_end_once_and_writes_a_file(tmp_path, strategy):
    path = tmp_path / "figures" / "confusion.png"
    callback, heard = Confusion(TASKS, path), Heard()
    run = fake_run(heard, strategy=strategy, state=strategy.init(MODEL))
    callback.on_fit_start(run)
    run.step = 40
    callback.on_step_end(run)
    callback.on_fit_end(run)
    ((step, published),) = heard
    image = published["confusion"]
    assert step == 40 and isinstance(image, em.Image) and image.pixels.dtype == np.uint8
    assert [p.name for p in path.parent.iterdir()] == ["confusion.png"]
    pixels = np.round(matplotlib.image.imread(path)[..., :3] * 255)
    assert np.array_equal(pixels, image.pixels)

    resumed = Confusion(TASKS, path)
    resumed.load_state_dict(callback.state_dict())
    run = fake_run(heard, strategy=strategy, state=run.state, start=40, resuming=True)
    resumed.on_fit_start(run)
    resumed.on_fit_end(run)
    assert len(heard) == 1  # nothing was trained since
    assert callback.writes and not Confusion(TASKS).writes


def test_reaches_tensorboard(tmp_path, strategy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [TensorBoard(tmp_path), Confusion(TASKS, every=4, name="seen")]
    trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=callbacks)
    trainer.fit(MODEL, TASKS, steps=6)
    # That of the end, which a run of more steps would not draw, is in a sub-run of its own.
    for folder, steps in ((tmp_path, [4]), (tmp_path / "at_end", [6])):
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        (tag,) = [tag for tag in events.Tags()["images"] if "seen" in tag]
        assert [event.step for event in events.Images(tag)] == steps


@pytest.mark.slow
def test_colour_images(strategy):
    images = np.repeat(IMAGES, 3, axis=1)
    tasks = em.tasks.Episodes(images, np.repeat(np.arange(6), 4), ways=3, shots=1, queries=3)
    figure = em.plot_confusion(strategy, Flat(jax.random.key(0), channels=3), tasks)
    assert figure.axes[0].get_images()[0].get_array().shape == (4, 4, 3)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"eqxmeta\[examples\]"):
        Confusion(TASKS)


def test_wrong_arguments(strategy):
    for wrong in ({"every": 0}, {"num_tasks": 0}, {"inner_steps": 0}, {"seed": -1}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            Confusion(TASKS, **wrong)
    with pytest.raises(TypeError, match="tasks"):
        Confusion(3)
    with pytest.raises(ValueError, match="does not classify images"):
        Confusion(em.tasks.Sinusoid(3, 3))

    still = Still(em.losses.cross_entropy, optax.sgd(0.1))
    with pytest.raises(ValueError, match="inner_steps"):
        em.plot_confusion(still, tiny_mlp(), TASKS, inner_steps=2)


def test_what_cannot_be_drawn_is_told_before_the_first_step(strategy):
    def refuse(strategy, model, **options):
        run = fake_run(strategy=strategy, state=strategy.init(model))
        Confusion(TASKS, **options).refuse(run)

    refuse(strategy, MODEL)
    with pytest.raises(TypeError) as caught:
        refuse(strategy, Flat(jax.random.key(0), channels=3))  # of coloured images
    assert "`Confusion`" in "".join(caught.value.__notes__)
    prototypes = em.ProtoNet(em.losses.cross_entropy, optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"(?s)`inner_steps` has no effect.*`ProtoNet`"):
        refuse(prototypes, MODEL, inner_steps=3)


class Dropping(eqx.Module):
    """With dropout, and with statistics of the support set."""

    dropout: eqx.nn.Dropout
    norm: em.nn.SupportNorm
    linear: eqx.nn.Linear

    def __init__(self):
        self.dropout = eqx.nn.Dropout(0.5)
        self.norm = em.nn.SupportNorm(1)
        self.linear = eqx.nn.Linear(16, 3, key=jax.random.key(0))

    def __call__(self, image, *, key=None):
        return self.linear(self.dropout(self.norm(image), key=key).ravel())


@pytest.mark.slow
@pytest.mark.parametrize("prototypes", [False, True])
def test_a_model_with_dropout_and_statistics(strategy, prototypes):
    if prototypes:
        strategy = em.ProtoNet(em.losses.cross_entropy, optax.adam(1e-3))
    trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=[Confusion(TASKS)], summary=False)
    assert int(trainer.fit(Dropping(), TASKS, 2).step) == 2
