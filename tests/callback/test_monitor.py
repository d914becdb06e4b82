"""A monitor of which nobody could know before the run that it has no value."""

from types import SimpleNamespace

import numpy as np
import pytest

import eqxmeta as em
from eqxmeta._callback.monitor import check_monitors
from eqxmeta.callbacks import (
    JSONL,
    AdaptationPlot,
    Callback,
    Checkpoint,
    Confusion,
    EarlyStopping,
    Evaluate,
    Histograms,
    Lambda,
    Logger,
    ProgressBar,
    TensorBoard,
)
from eqxmeta.tasks import Episodes, Sinusoid

from ..boring import BoringModel, BoringStrategy, BoringTasks, boring_fit
from ..fake_run import fake_run

pytestmark = pytest.mark.usefixtures("as_users_run_it")


class Publishes(Callback):
    """Publishes `late` at step 10, that is the first multiple of `every`."""

    every = 10

    def on_step_end(self, run):
        run.log({"late": float(run.step)})


class MoreOfEvaluate(Evaluate):
    def on_step_end(self, run):
        super().on_step_end(run)
        run.log({"late": float(run.step)})


@pytest.mark.parametrize("own", [Publishes(), MoreOfEvaluate(BoringTasks(), every=10, num_tasks=2)])
def test_what_is_published_later_is_not_refused(own, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2, keep=1, monitor="late", mode="min")
    boring_fit(12, callbacks=[own, checkpoint, EarlyStopping("late", patience=9, mode="min")])
    assert checkpoint.best_path == tmp_path / "step-000000010.ckpt"


IMAGES = Episodes(np.zeros((8, 4, 4), np.float32), np.repeat(np.arange(4), 2), 2, 1, 1)
OURS = {
    AdaptationPlot: lambda f: AdaptationPlot(Sinusoid(2, 2), f / "a.png"),
    Checkpoint: lambda f: Checkpoint(f, every=2),
    Confusion: lambda f: Confusion(IMAGES),
    EarlyStopping: lambda f: EarlyStopping("loss", patience=1, every=2),
    Evaluate: lambda f: Evaluate(BoringTasks(), every=2),
    Histograms: lambda f: Histograms(every=2),
    JSONL: lambda f: JSONL(f / "log.jsonl"),
    ProgressBar: lambda f: ProgressBar(),
    TensorBoard: lambda f: TensorBoard(f),
}


def test_beside_any_of_ours_a_misspelt_monitor_is_refused(tmp_path):
    kinds = {kind for kind in vars(em.callbacks).values() if isinstance(kind, type)}
    assert kinds - {Callback, Lambda, Logger} == set(OURS)  # of those nobody knows what they log
    for make in OURS.values():
        callback = make(tmp_path)
        if isinstance(callback, Evaluate):
            state = SimpleNamespace(model=BoringModel())
            callback.refuse(fake_run(strategy=BoringStrategy(), state=state))
        with pytest.raises(ValueError, match="'los'"):
            check_monitors([callback, Checkpoint(tmp_path, every=2, monitor="los")], {"loss"})


@pytest.mark.parametrize("what", ["Checkpoint", "EarlyStopping"])
def test_the_first_miss_is_told_at_the_users_line(what, tmp_path):
    steps = []
    monitoring = {
        "Checkpoint": Checkpoint(tmp_path, every=2, keep=1, monitor="lat", mode="min"),
        "EarlyStopping": EarlyStopping("lat", patience=9, mode="min"),
    }[what]
    watch = Lambda(on_chunk_end=lambda run, metrics: steps.append((run.step, len(caught))))
    with pytest.warns(RuntimeWarning, match=rf"`{what}\(monitor=(.|\n)*'lat'(.|\n)*late") as caught:
        boring_fit(16, callbacks=[watch, Publishes(), monitoring])
    assert len(caught) == 1 and "eqxmeta" not in caught[0].filename
    # Told before the hooks of step 12, the second of the three at which a checkpoint is due.
    assert {count for step, count in steps if step <= 10} == {0}
    assert steps[-1][0] == 16  # and the run goes on


def test_a_point_of_a_curve_is_a_name(tmp_path):
    evaluate = Evaluate(BoringTasks(), every=2, num_tasks=2)
    checkpoint = Checkpoint(tmp_path, every=2, monitor="eval/loss/after_0")
    boring_fit(2, callbacks=[evaluate, checkpoint])
    assert checkpoint.best_path == checkpoint.last_path
