"""A logger of the user's own, and the services of the example, which are played here."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Evaluate, Lambda, Logger

from ..boring import BoringTasks, Recorder, boring_fit

EXAMPLE = Path(__file__).parent.parent.parent / "examples/own_logger.py"


class Lines(Logger):
    def __init__(self, **options):
        super().__init__(**options)
        self.lines, self.images = [], []

    def write(self, step, values):
        self.lines.append((step, dict(values)))

    def write_image(self, step, name, pixels):
        self.images.append((step, name, pixels.shape))


def test_what_is_written():
    logger, recorder = Lines(every=2), Recorder()
    evaluate = Evaluate(BoringTasks(), every=4, num_tasks=5)
    picture = em.Image(np.zeros((2, 3, 3), np.uint8))
    logs = {"note": 1.0, "picture": picture, "all": em.Histogram(np.ones(3))}
    extra = Lambda(every=4, on_step_end=lambda run: run.log(logs))
    boring_fit(5, callbacks=[logger, recorder, evaluate, extra])
    rows = recorder.metrics
    trained = [(step, x["train/loss"]) for step, x in logger.lines if "train/loss" in x]
    assert trained == [(2, float(rows["loss"][1])), (4, float(rows["loss"][3]))]
    measured = [(step, x) for step, x in logger.lines if "eval/loss" in x]
    assert [step for step, _ in measured] == [4, 5]
    last = evaluate.result
    assert measured[-1][1] == {"eval/loss": last.mean()[-1], "eval/loss/ci95": last.ci95()[-1]}
    assert (4, {"note": 1.0}) in logger.lines
    assert logger.images == [(4, "picture", (2, 3, 3))]
    assert all(type(x) is float for _, values in logger.lines for x in values.values())


def test_write_must_be_filled_in():
    with pytest.raises(TypeError, match="write"):
        Logger()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(ValueError, match=r"Logger\(every="):
        Lines(every=0)


class Service(ModuleType):
    """Both services, as far as the example uses them: what they were told."""

    def __init__(self, name):
        super().__init__(name)
        self.told, self.config, self.ended = [], None, []

    def init(self, config, project):
        self.config = config
        return self

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self, exit_code=0):
        self.ended.append(exit_code)

    def active_run(self):
        return None

    def start_run(self):
        pass

    def log_params(self, config):
        self.config = config

    def log_metrics(self, values, step):
        self.told.append((step, values))

    def end_run(self, status="FINISHED"):
        self.ended.append(status)


@pytest.mark.parametrize(
    ("name", "make", "ended"),
    [
        ("wandb", lambda m: m["WeightsAndBiases"](project="x", every=5), [0, 1]),
        ("mlflow", lambda m: m["MLflow"](every=5), ["FINISHED", "FAILED"]),
    ],
)
def test_the_example(monkeypatch, name, make, ended):
    monkeypatch.setitem(sys.modules, name, service := Service(name))
    module = runpy.run_path(str(EXAMPLE))
    boring_fit(10, callbacks=[make(module), Evaluate(BoringTasks(), every=10, num_tasks=3)])
    assert service.config["meta_batch_size"] in (2, "2")
    assert [step for step, values in service.told if "train/loss" in values] == [5, 10]
    assert [step for step, values in service.told if "eval/loss" in values] == [10]

    def fail(run):
        raise OSError

    with pytest.raises(OSError):
        boring_fit(10, callbacks=[make(module), Lambda(every=5, on_step_end=fail)])
    assert service.ended == ended
