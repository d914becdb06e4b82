"""The best state of a run, from its folder alone."""

import re

import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Lambda

from ..boring import BoringModel, BoringStrategy, Recorder, at, boring_fit, same_bits
from ..helpers import tiny_mlp

VALUES = {2: 3.0, 4: 1.0, 6: 1.0, 8: float("nan"), 10: 2.0, 12: 5.0}


def fit(folder, steps=12, *, resume=None, others=(), **options):
    """A run whose `score` is as above, saved every other step."""
    log = Lambda(every=1, on_step_end=lambda run: run.log({"score": VALUES.get(run.step, -9.0)}))
    checkpoint = Checkpoint(folder, every=2, **{"keep": 1, "monitor": "score", **options})
    boring_fit(steps, callbacks=[log, checkpoint, *others], resume=resume)
    return checkpoint


def best(folder, monitor=None):
    return em.load_best(folder, BoringStrategy(), BoringModel(), monitor)


@pytest.mark.parametrize(("mode", "step"), [("min", 4), ("max", 12)])
def test_the_best_by_what_the_run_monitored(tmp_path, mode, step):
    checkpoint = fit(tmp_path, mode=mode)
    state = best(tmp_path)
    assert isinstance(state, em.TrainState)
    assert same_bits(state, boring_fit(step))
    assert checkpoint.best_path == tmp_path / f"step-{step:09}.ckpt"
    assert same_bits(best(str(tmp_path), "score"), state)


def test_a_run_goes_on_from_the_best_and_the_model_is_the_users(tmp_path):
    fit(tmp_path, mode="min")
    state = em.load_best(tmp_path, BoringStrategy(), model=BoringModel())
    assert isinstance(state.model, BoringModel)
    assert int(boring_fit(5, model=state.model).step) == 5


def test_of_several_callbacks_each_folder_has_its_own_best(tmp_path):
    others = [Checkpoint(tmp_path / "b", every=2, monitor="score", mode="max", name="b")]
    fit(tmp_path / "a", mode="min", others=others)
    assert [int(best(tmp_path / name).step) for name in "ab"] == [4, 12]
    for name, step in (("a", 4), ("b", 12)):
        with pytest.raises(em.CheckpointNotFound, match=f"the best step-{step:09}.ckpt"):
            em.load_model(tmp_path / name, BoringModel())


def test_a_run_that_was_resumed_with_another_monitor(tmp_path):
    fit(tmp_path, 6, mode="min", keep=None)
    fit(tmp_path, 12, monitor="index", mode="max", keep=None, resume="auto")
    assert int(best(tmp_path).step) == int(best(tmp_path, "index").step) == 12
    assert int(best(tmp_path, "score").step) == 4


def test_a_save_for_the_end_alone_is_not_the_best(tmp_path):
    stop = Recorder("stop", every=1, act=at("on_step_end", 5, lambda run: run.request_stop("")))
    checkpoint = fit(tmp_path, mode="min", keep=None, others=[stop])
    assert int(best(tmp_path).step) == 4  # that of step 5 has -9, and is there
    assert checkpoint.best_path == tmp_path / "step-000000004.ckpt"
    assert checkpoint.last_path == tmp_path / "step-000000005.ckpt"
    # All steps were taken: it is the best, until the run goes on.
    for steps, step in ((5, 5), (12, 4)):
        checkpoint = fit(tmp_path / "b", steps, mode="min", keep=None, resume="auto")
        assert int(best(tmp_path / "b").step) == step
        assert checkpoint.best_path == tmp_path / "b" / f"step-{step:09}.ckpt"


def test_a_damaged_file_and_one_of_another_run_are_passed_over(tmp_path):
    fit(tmp_path / "other", 2, mode="min")
    fit(tmp_path / "a", mode="min", keep=None)
    (tmp_path / "a" / "step-000000012.ckpt").write_bytes(b"")
    other = tmp_path / "other" / "step-000000002.ckpt"
    other.rename(tmp_path / "a" / "step-000000001.ckpt")  # its value is no better, and not ours
    assert int(best(tmp_path / "a").step) == 4


def refused(folder, told, monitor=None, **options):
    with pytest.raises((em.CheckpointError, TypeError, ValueError)) as error:
        em.load_best(folder, **{"strategy": BoringStrategy(), "model": BoringModel(), **options},
                     monitor=monitor)  # fmt: skip
    assert re.search(rf"(?s)\nReceived: .*{told}", str(error.value)), error.value


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_loaded(tmp_path):
    refused(tmp_path / "no", "does not exist.*Expected: a folder of `Checkpoint`")
    refused(tmp_path, "no sound.*Expected: a folder of `Checkpoint`")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", r"a file.*eqxmeta\.load_model\(path, model\)")
    refused(None, "a path")
    fit(tmp_path / "none", 2, monitor=None)
    refused(tmp_path / "none", r"1 checkpoints, monitored: none: `Checkpoint` had no `monitor`")
    fit(tmp_path / "a", 4, mode="min")
    refused(tmp_path / "a", "monitored: 'score'.*Expected: a name that `Checkpoint", "eval/loss")
    refused(tmp_path / "a", "a name", "")
    refused(tmp_path / "a", "an instance of `Strategy`", strategy="MAML")
    refused(tmp_path / "a", "the model in it", model=BoringStrategy().init(BoringModel()))
    maml = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(1.0), 1), optax.sgd(1.0))
    told = r"only in `strategy\.init\(model\)`: .model.hidden"
    refused(tmp_path / "a", told, model=tiny_mlp(), strategy=maml)
    stop = Recorder("stop", every=1, act=at("on_step_end", 1, lambda run: run.request_stop("")))
    fit(tmp_path / "early", 4, mode="min", others=[stop])
    refused(
        tmp_path / "early", "'score'; and step-000000001.ckpt, measured where the run was broken"
    )
