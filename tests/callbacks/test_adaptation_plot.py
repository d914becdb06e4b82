import sys

import equinox as eqx
import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import eqxmeta as em
import eqxmeta.losses
from eqxmeta._callback.published import Curve, Image
from eqxmeta._evaluation.evaluate import with_num_inner_steps
from eqxmeta._evaluation.plot_adaptation import plot_adaptation
from eqxmeta._meta_gradient.inner_loop import InnerLoop
from eqxmeta.callbacks import AdaptationPlot, Evaluate
from eqxmeta.strategies import MAML
from eqxmeta.tasks import Sinusoid

from ..fake_run import fake_run
from ..helpers import tiny_mlp

TASKS = Sinusoid(5, 7)


@pytest.fixture(scope="module")
def strategy():
    inner = InnerLoop(optax.sgd(0.1), steps=1)
    return MAML(eqxmeta.losses.mse, inner=inner, optimizer=optax.adam(1e-3))


class Heard(list):
    def on_log(self, run, scalars):
        self.append((run.step, scalars))


def test_draws_at_the_end_once_and_publishes(tmp_path, strategy):
    path = tmp_path / "figures" / "fit.png"
    callback = AdaptationPlot(TASKS, path, num_tasks=2, inner_steps=(1,))
    heard = Heard()
    run = fake_run(heard, strategy=strategy, state=strategy.init(tiny_mlp()))
    callback.on_fit_start(run)
    run.step = 40
    callback.on_step_end(run)
    callback.on_fit_end(run)
    ((step, published),) = heard
    image = published["adaptation"]
    assert step == 40 and isinstance(image, Image) and image.pixels.dtype == np.uint8
    assert [p.name for p in path.parent.iterdir()] == ["fit.png"]
    pixels = np.round(matplotlib.image.imread(path)[..., :3] * 255)
    assert np.array_equal(pixels, image.pixels)
    assert len(np.unique(image.pixels.reshape(-1, 3), axis=0)) > 20

    resumed = AdaptationPlot(TASKS, path, num_tasks=2, inner_steps=(1,))
    resumed.load_state_dict(callback.state_dict())
    run = fake_run(heard, strategy=strategy, state=run.state, start=40, resuming=True)
    resumed.on_fit_start(run)
    resumed.on_fit_end(run)
    assert len(heard) == 1  # nothing was trained since


def test_lines_are_the_adapted_models(strategy):
    models = {"a": tiny_mlp(jax.random.key(1)), "b": tiny_mlp(jax.random.key(2))}
    learners = {name: (strategy, model) for name, model in models.items()}
    figure = plot_adaptation(learners, TASKS, num_tasks=1, inner_steps=(1, 3), seed=4)
    assert len(figure.axes) == 2
    for panel, (name, model) in zip(figure.axes, models.items(), strict=True):
        assert panel.get_title() == name
        lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
        support = np.asarray(panel.collections[0].get_offsets())
        assert support.shape == (5, 2)
        assert set(lines) == {"the task", "before adapting", "after 1 step", "after 3 steps"}
        assert len(lines["the task"]) >= 100  # dense, though the task has 7 queries
        x = np.asarray(lines["the task"][:, :1], np.float32)
        for label, k in (("before adapting", 0), ("after 1 step", 1), ("after 3 steps", 3)):
            data = (support[:, :1].astype(np.float32), support[:, 1:].astype(np.float32))
            adapted = with_num_inner_steps(strategy, k).inner_adapt(model, data)
            expected = np.asarray(jax.vmap(adapted)(x))[:, 0]
            assert np.allclose(lines[label][:, 1], expected, rtol=1e-4, atol=1e-5)


def test_a_strategy_without_inner_steps_is_drawn_adapted():
    strategy = em.R2D2(em.losses.mse, optax.sgd(0.1))
    model = strategy.init(tiny_mlp()).model
    AdaptationPlot(TASKS, "fit.png").check(strategy, model)
    (panel,) = plot_adaptation({"a": (strategy, model)}, TASKS, num_tasks=1).axes
    lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
    assert set(lines) == {"the task", "adapted"}
    support = np.asarray(panel.collections[0].get_offsets(), np.float32)
    adapted = strategy.inner_adapt(model, (support[:, :1], support[:, 1:]))
    expected = np.asarray(jax.vmap(adapted)(np.asarray(lines["the task"][:, :1], np.float32)))
    assert np.allclose(lines["adapted"][:, 1], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"eqxmeta\[examples\]"):
        AdaptationPlot(TASKS, "fit.png")


def test_wrong_arguments(strategy):
    with pytest.raises(ValueError, match="every"):
        AdaptationPlot(TASKS, "fit.png", every=0)
    with pytest.raises(ValueError, match="num_tasks"):
        AdaptationPlot(TASKS, "fit.png", num_tasks=0)
    with pytest.raises(TypeError, match="inner_steps"):
        AdaptationPlot(TASKS, "fit.png", inner_steps=())
    with pytest.raises(TypeError, match="tasks"):
        AdaptationPlot(3, "fit.png")
    with pytest.raises(ValueError, match="learners"):
        plot_adaptation({}, TASKS)
    assert AdaptationPlot(TASKS, "fit.png").writes


def test_evaluate_publishes_curves(strategy):
    callback = Evaluate(TASKS, every=5, num_tasks=4, inner_steps=2, prefix="test")
    assert callback.name == "Evaluate[test]" and Evaluate(TASKS, every=5).name is None
    heard = Heard()
    run = fake_run(heard, strategy=strategy, state=strategy.init(tiny_mlp()))
    callback.on_step_end(run)
    curve = heard[0][1]["test/loss"]
    assert isinstance(curve, Curve) and curve.mean.shape == (3,)
    assert callback.result is not None and callback.seconds > 0
    assert np.array_equal(curve.mean, callback.result.mean("loss"))
    assert np.array_equal(curve.ci95, callback.result.ci95("loss"))
    for kwargs in (
        {"every": 0},
        {"num_tasks": 0},
        {"inner_steps": 0},
        {"seed": -1},
        {"prefix": ""},
    ):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            Evaluate(TASKS, **{"every": 5, **kwargs})


class Dropping(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, outputs=1):
        self.mlp = eqx.nn.MLP(1, outputs, 8, 1, key=jax.random.key(0))
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        return self.mlp(self.dropout(x, key=key))


def test_a_model_with_dropout_adapts_with_it_and_predicts_without(tmp_path, strategy):
    callback = AdaptationPlot(TASKS, tmp_path / "a.png", num_tasks=1, inner_steps=(1,))
    run = fake_run(strategy=strategy, state=strategy.init(Dropping()))
    callback.refuse(run)
    pictures = [(callback.on_step_end(run), (tmp_path / "a.png").read_bytes()) for _ in range(2)]
    assert pictures[0] == pictures[1]  # the same key every time


def _size(model, batch, key):
    return (eqxmeta.losses.predict(model, batch[0], key) ** 2).mean(), {}


def test_what_cannot_be_drawn_is_told_before_the_first_step(tmp_path, strategy):
    def refuse(strategy, model):
        state = strategy.init(model)
        AdaptationPlot(TASKS, tmp_path / "a.png").refuse(fake_run(strategy=strategy, state=state))

    with pytest.raises(ValueError, match=r"(?s)cannot draw.*\[7, 2\] for 7 examples.*one output"):
        # Of a loss that takes them: `mse` itself would refuse.
        refuse(MAML(_size, strategy.inner, strategy.optimizer), Dropping(outputs=2))
    with pytest.raises(TypeError) as caught:
        refuse(strategy, eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0)))
    assert "`AdaptationPlot`" in "".join(caught.value.__notes__)


class Padded(eqx.Module):
    """Waves of which two support and three query points are there, and as many are not."""

    def sample(self, key):
        task = Sinusoid(4, 6).sample(key)

        def padded(batch):
            x, y = batch
            there = np.arange(len(x)) % 2 == 0
            return x + 99.0 * ~there[:, None], y, np.asarray(there, np.float32)

        return em.Task(padded(task.support), padded(task.query))


@pytest.mark.slow
def test_padding_is_not_drawn(strategy):
    figure = plot_adaptation({"a": (strategy, tiny_mlp())}, Padded(), num_tasks=1, inner_steps=(2,))
    (panel,) = figure.axes
    support = np.asarray(panel.collections[0].get_offsets())
    assert support.shape == (2, 2) and (support[:, 0] < 9).all()
    lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
    assert all(line.shape == (5, 2) and (line[:, 0] < 9).all() for line in lines.values())
    x, y = (support[:, i : i + 1].astype(np.float32) for i in (0, 1))
    adapted = with_num_inner_steps(strategy, 2).inner_adapt(tiny_mlp(), (x, y))
    expected = np.asarray(jax.vmap(adapted)(lines["the task"][:, :1]))[:, 0]
    assert np.allclose(lines["after 2 steps"][:, 1], expected, rtol=1e-4, atol=1e-5)
