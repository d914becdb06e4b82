import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxmeta import (
    MAML,
    CheckpointCorrupt,
    Curve,
    Image,
    InnerLoop,
    TrainState,
    load,
    load_model,
    losses,
    save,
)
from eqxmeta._callback.callback import Callback, attach, name_of
from eqxmeta._callback.run import Origin, Run
from eqxmeta._checkpoint.names import best_of
from eqxmeta._checkpoint.save_load import read_manifest, write_tree
from eqxmeta.callbacks import Checkpoint

from ..fake_run import settings

STRATEGY = MAML(losses.mse, inner=InnerLoop(optax.sgd(0.1), steps=1), optimizer=optax.sgd(0.1))


class Counter(Callback):
    """Another callback whose state belongs into the file."""

    def __init__(self):
        self.count = 0

    def on_chunk_end(self, run, metrics):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}


def state_at(step: int) -> TrainState:
    return TrainState(jnp.int32(step), jnp.full(3, float(step)), ())


def fit(checkpoint, steps, *, resume=None, loss=None, logs=None, others=(), stop=None):
    """What the trainer does, without training: chunks of 10 steps, hooks, `resume` from a file.

    `loss` and `logs`, functions of the step, are the metric of that step and what is published.
    """
    start, end = 0, steps if stop is None else stop
    callbacks = attach([*others, checkpoint])
    if resume is not None:
        states = read_manifest(resume)["meta"]["callbacks"]
        start = read_manifest(resume)["meta"]["step"]
        for callback in callbacks:
            callback.load_state_dict(states[name_of(callback)])
    meta = {} if resume is None else read_manifest(resume)["meta"]
    run = Run(
        settings(STRATEGY, steps, {"seed": 5, "lr": 0.1}),
        Origin(state_at(start), resuming=resume is not None, path=resume, meta=meta),
        state_after=state_at,
        publish=lambda scalars: [c.on_log(run, scalars) for c in callbacks] and None,
        callback_states=lambda: {name_of(c): c.state_dict() for c in callbacks},
        sync_callbacks=lambda: [c.sync_files() for c in callbacks] and None,
    )
    with checkpoint.exclusive():
        for callback in callbacks:
            callback.on_fit_start(run)
        while run.step < end:
            first = run.step + 1
            run.step = min(run.step + 10, end)
            rows = np.arange(first, run.step + 1)
            metrics = {"step": rows}
            if loss is not None:
                metrics["loss"] = np.array([loss(step) for step in rows])
            for callback in callbacks:
                callback.on_chunk_end(run, metrics)
            if logs is not None and logs(run.step) is not None:
                run.log(logs(run.step))
            if run.step % checkpoint.every == 0:
                checkpoint.on_step_end(run)
        for callback in callbacks:
            callback.on_fit_end(run)


def steps_in(folder) -> list[int]:
    return sorted(int(path.name[5:-5]) for path in folder.glob("step-*.ckpt"))


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spoil(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_it_saves_at_multiples_and_at_the_end(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=20, keep=None)
    fit(checkpoint, 65)
    assert names_in(tmp_path) == [f"step-{step:09}.ckpt" for step in (20, 40, 60, 65)]
    assert checkpoint.last_path == tmp_path / "step-000000065.ckpt"
    assert checkpoint.best_path is None


def test_the_last_step_is_saved_once(tmp_path):
    fit(Checkpoint(tmp_path, every=20), 40)
    assert steps_in(tmp_path) == [20, 40]


def test_a_stopped_run_saves_where_it_stopped(tmp_path):
    fit(Checkpoint(tmp_path, every=20), 100, stop=33)
    assert steps_in(tmp_path) == [20, 33]


def test_a_run_without_a_step_saves_nothing(tmp_path):
    fit(Checkpoint(tmp_path / "a" / "b", every=20, monitor="loss"), 100, stop=0)
    assert names_in(tmp_path) == []


def test_the_newest_are_kept(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=10, keep=2)
    fit(checkpoint, 75)
    assert steps_in(tmp_path) == [70, 75]
    assert checkpoint.last_path == tmp_path / "step-000000075.ckpt"


def test_the_file_holds_the_run(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=10, monitor="loss")
    fit(checkpoint, 20, others=[Counter()], loss=float)
    meta = read_manifest(tmp_path / "step-000000020.ckpt")["meta"]
    assert (meta["step"], meta["seed"], meta["config"]) == (20, 5, {"seed": 5, "lr": 0.1})
    assert meta["callbacks"]["Counter"] == {"count": 2}
    state = load(tmp_path / "step-000000020.ckpt", state_at(0))
    assert eqx.tree_equal(state, state_at(20))


def test_the_state_in_the_file_knows_of_the_file(tmp_path):
    fit(Checkpoint(tmp_path, every=10, keep=None, monitor="loss"), 30, loss=lambda s: -s)
    for step in (10, 20, 30):
        meta = read_manifest(tmp_path / f"step-{step:09}.ckpt")["meta"]
        assert meta["callbacks"]["Checkpoint"]["best_step"] == step
        assert meta["callbacks"]["Checkpoint"]["best_value"] == -step


VALUES = {10: 3.0, 20: 1.0, 30: 1.0, 40: math.nan, 50: 2.0, 60: 5.0}


@pytest.mark.parametrize(("mode", "best"), [("min", 20), ("max", 60)])
def test_the_best_is_kept_as_well(tmp_path, mode, best):
    checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor="eval/loss", mode=mode)
    fit(checkpoint, 60, logs=lambda step: {"eval/loss": VALUES[step]})
    assert steps_in(tmp_path) == sorted({best, 60})
    assert checkpoint.best_path == tmp_path / f"step-{best:09}.ckpt"


def test_the_so_many_best_are_kept(tmp_path):
    """Of equals the first; also by a run that is resumed, with what it had before."""
    values = {10: 5.0, 20: 3.0, 30: 4.0, 40: 3.0, 50: 9.0, 60: 2.0, 70: math.nan, 80: 8.0}

    def checkpoint():
        return Checkpoint(tmp_path, every=10, keep=1, monitor="eval/loss", keep_best=3)

    def logs(step):
        return {"eval/loss": values[step]}

    fit(first := checkpoint(), 80, logs=logs, stop=50)
    assert steps_in(tmp_path) == [20, 30, 40, 50]
    assert first.best_path.name == "step-000000020.ckpt"
    fit(second := checkpoint(), 80, logs=logs, resume=first.last_path)
    assert steps_in(tmp_path) == [20, 40, 60, 80]
    assert second.best_path == best_of(tmp_path) == tmp_path / "step-000000060.ckpt"
    told = read_manifest(second.last_path)["meta"]["callbacks"]["Checkpoint"]
    assert told["behind"] == {"20": 3.0, "40": 3.0}
    with pytest.raises(ValueError, match=r"keep_best=...\)` has no effect(.|\n)*monitor"):
        Checkpoint(tmp_path, every=10, keep_best=2)


def test_a_second_try_renames_the_files_of_the_first(tmp_path):
    fit(Checkpoint(tmp_path, every=10), 20)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fit(Checkpoint(tmp_path, every=10), 20)
    old = (tmp_path / "step-000000010.ckpt").read_bytes()
    with pytest.warns(RuntimeWarning, match=r"begins anew: 2 checkpoints in .* are now \*\.stale"):
        fit(Checkpoint(tmp_path, every=10, overwrite=True), 10)
    assert steps_in(tmp_path) == [10]
    assert (tmp_path / "step-000000010.ckpt.stale").read_bytes() == old
    assert (tmp_path / "step-000000020.ckpt.stale").exists()


def test_the_file_holds_an_average_beside_the_state(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=10, model=lambda state: 2 * state.model)
    fit(checkpoint, 10)
    state = load(checkpoint.last_path, state_at(0))
    np.testing.assert_array_equal(state.model, np.full(3, 10.0))
    np.testing.assert_array_equal(load_model(checkpoint.last_path, jnp.zeros(3)), np.full(3, 20.0))
    fit(Checkpoint(tmp_path, every=10), 20, resume=checkpoint.last_path)
    newest = load_model(tmp_path / "step-000000020.ckpt", jnp.zeros(3))
    np.testing.assert_array_equal(newest, np.full(3, 20.0))  # of a run without


def test_a_former_best_goes(tmp_path):
    fit(Checkpoint(tmp_path, every=10, keep=1, monitor="loss"), 50, loss=lambda s: -min(s, 30))
    assert steps_in(tmp_path) == [30, 50]


def test_of_a_curve_the_last_point_counts(tmp_path):
    def logs(step):
        return {"eval/loss": Curve(np.array([-float(step), abs(step - 20.0)]), np.zeros(2))}

    checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor="eval/loss")
    fit(checkpoint, 50, logs=logs)
    assert checkpoint.best_path == tmp_path / "step-000000020.ckpt"


def test_a_training_metric_counts_at_the_very_step(tmp_path):
    # Step 19 is better, but it is not saved.
    checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor="loss")
    fit(checkpoint, 50, loss=lambda step: {19: -9.0, 30: -1.0}.get(int(step), 0.0))
    assert checkpoint.best_path == tmp_path / "step-000000030.ckpt"


def test_a_value_of_an_earlier_step_does_not_count(tmp_path):
    def logs(step):
        return {"eval/loss": -100.0} if step == 10 else {"eval/loss": 1.0} if step == 40 else None

    checkpoint = Checkpoint(tmp_path, every=20, keep=1, monitor="eval/loss")
    fit(checkpoint, 60, logs=logs)
    assert checkpoint.best_path == tmp_path / "step-000000040.ckpt"


def test_a_monitor_that_never_was_is_told_with_those_that_were(tmp_path):
    def logs(step):
        image = Image(np.zeros((1, 1, 3), np.uint8))
        return {"eval/loss": 1.0, "picture": image}

    with pytest.warns(RuntimeWarning, match="'eval/los'(.|\n)*Received: eval/loss, loss\n"):
        fit(
            Checkpoint(tmp_path, every=10, monitor="eval/los", mode="min"),
            20,
            loss=float,
            logs=logs,
        )


def test_a_monitor_seen_only_between_saves_is_told(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=20, monitor="x", mode="min")
    with pytest.warns(RuntimeWarning, match="no value at any save"):
        fit(checkpoint, 40, logs=lambda step: {"x": 1.0} if step == 10 else None)


def test_a_used_folder_is_refused(tmp_path):
    fit(Checkpoint(tmp_path, every=10), 20)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for checkpoint in (Checkpoint(tmp_path, every=10), Checkpoint(tmp_path, every=10, name="x")):
        with pytest.raises(FileExistsError, match=r"Received: 2 of them(.|\n)*resume=\"auto\""):
            fit(checkpoint, 20)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    others = [
        "notes.txt",
        "step-1.ckpt.bak",
        "best.ckpt",
        ".x.tmp",
        "step-000000001.ckpt.stale",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    fit(Checkpoint(tmp_path, every=10, keep=1), 50)
    assert names_in(tmp_path) == sorted([*others, "step-000000050.ckpt"])
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_resume_paths_are_the_newest_first(tmp_path):
    checkpoint = Checkpoint(tmp_path / "runs", every=10, keep=None)
    assert list(checkpoint.resume_paths()) == []
    fit(checkpoint, 30)
    (tmp_path / "runs" / ".step-000000040.ckpt.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "runs" / "step-000000050.ckpt").mkdir()
    # Not what is no name of ours: the digits are others, or too many.
    for odd in ("step-٠٠٠٠٠٠٠٦٠.ckpt", "step-0000000060.ckpt", "step-000000060.ckpt.stale"):
        (tmp_path / "runs" / odd).touch()
    names = [path.name for path in Checkpoint(tmp_path / "runs", every=10).resume_paths()]
    # What is in the way of a file is told of when it is read.
    assert names == [f"step-{step:09}.ckpt" for step in (50, 30, 20, 10)]


def test_steps_beyond_nine_digits_are_the_newest(tmp_path):
    for name in ("step-999999999.ckpt", "step-1000000000.ckpt"):
        (tmp_path / name).touch()
    paths = Checkpoint(tmp_path, every=1).resume_paths()
    assert paths[0].name == "step-1000000000.ckpt"


def test_leftover_temporaries_are_removed(tmp_path):
    (tmp_path / ".step-000000040.ckpt.0123abcd.tmp").write_bytes(b"half")
    fit(Checkpoint(tmp_path, every=10), 10)
    assert names_in(tmp_path) == ["step-000000010.ckpt"]


def test_a_resumed_run_goes_on_like_an_uninterrupted_one(tmp_path):
    def new(name):
        return Checkpoint(tmp_path / name, every=10, keep=2, monitor="loss")

    def loss(step):
        return abs(step - 20.0)

    fit(new("whole"), 80, loss=loss)
    fit(new("parts"), 50, loss=loss)
    resumed = new("parts")
    fit(resumed, 80, loss=loss, resume=resumed.resume_paths()[0])
    assert steps_in(tmp_path / "parts") == steps_in(tmp_path / "whole") == [20, 70, 80]
    assert resumed.best_path == tmp_path / "parts" / "step-000000020.ckpt"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    fit(Checkpoint(tmp_path, every=10, monitor="loss"), 30, loss=float)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    checkpoint = Checkpoint(tmp_path, every=10, monitor="loss")
    fit(checkpoint, 30, resume=checkpoint.resume_paths()[0])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert checkpoint.last_path == tmp_path / "step-000000030.ckpt"
    assert checkpoint.best_path == tmp_path / "step-000000010.ckpt"


def test_what_a_killed_run_had_still_to_remove_is_removed_when_it_is_resumed(tmp_path):
    # Killed between the last file and the removal of the old: no other save is to come.
    fit(Checkpoint(tmp_path, every=10, keep=None, monitor="loss"), 50, loss=lambda s: abs(s - 20.0))
    foreign = tmp_path / "step-000000007.ckpt"
    save(foreign, state_at(7), meta={"run": "another", "step": 7})
    checkpoint = Checkpoint(tmp_path, every=10, keep=2, monitor="loss")
    fit(checkpoint, 50, resume=tmp_path / "step-000000050.ckpt")
    assert steps_in(tmp_path) == [7, 20, 40, 50]


def test_skipped_files_are_set_aside_not_overwritten(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=10)
    fit(checkpoint, 30)
    spoil(tmp_path / "step-000000030.ckpt")
    spoiled = (tmp_path / "step-000000030.ckpt").read_bytes()
    with pytest.raises(CheckpointCorrupt):
        read_manifest(checkpoint.resume_paths()[0])
    for name in ("step-000000030.ckpt.stale", "step-000000030.ckpt.stale-1"):
        with pytest.warns(RuntimeWarning, match="step-000000030.ckpt is now " + name):
            fit(Checkpoint(tmp_path, every=10), 30, resume=tmp_path / "step-000000020.ckpt")
        spoil(tmp_path / "step-000000030.ckpt")
    assert (tmp_path / "step-000000030.ckpt.stale").read_bytes() == spoiled
    assert steps_in(tmp_path) == [10, 20, 30]


def test_a_damaged_file_before_the_start_stays(tmp_path):
    fit(Checkpoint(tmp_path, every=10), 30)
    spoil(tmp_path / "step-000000010.ckpt")
    fit(Checkpoint(tmp_path, every=10, keep=1), 50, resume=tmp_path / "step-000000030.ckpt")
    assert steps_in(tmp_path) == [10, 50]


def test_files_of_another_run_are_never_removed(tmp_path):
    fit(Checkpoint(tmp_path / "a", every=10), 20)
    fit(Checkpoint(tmp_path / "b", every=10), 20)
    foreign = (tmp_path / "b" / "step-000000010.ckpt").read_bytes()
    resumed = Checkpoint(tmp_path / "b", every=10, keep=1)
    fit(resumed, 60, resume=tmp_path / "a" / "step-000000020.ckpt")
    assert steps_in(tmp_path / "a") == [10, 20]
    assert steps_in(tmp_path / "b") == [10, 20, 60]
    assert (tmp_path / "b" / "step-000000010.ckpt").read_bytes() == foreign


def test_a_best_that_is_gone_is_forgotten(tmp_path):
    fit(Checkpoint(tmp_path, every=10, monitor="loss"), 30, loss=float)
    (tmp_path / "step-000000010.ckpt").unlink()
    checkpoint = Checkpoint(tmp_path, every=10, monitor="loss")
    fit(checkpoint, 50, loss=float, resume=tmp_path / "step-000000030.ckpt")
    assert checkpoint.best_path == tmp_path / "step-000000040.ckpt"


def test_the_best_by_another_monitor_is_forgotten(tmp_path):
    fit(Checkpoint(tmp_path, every=10, monitor="loss"), 30, loss=float)
    checkpoint = Checkpoint(tmp_path, every=10, monitor="loss", mode="max")
    fit(checkpoint, 50, loss=float, resume=tmp_path / "step-000000030.ckpt")
    assert checkpoint.best_path == tmp_path / "step-000000050.ckpt"


def test_the_best_by_another_monitor_stays(tmp_path):
    """Until nobody asks for it: whoever looks for it by its name must find it."""

    def logs(step):
        return {"a": abs(step - 10.0), "b": abs(step - 50.0)}

    newest = 0
    for monitor, steps in (("a", 30), ("b", 60), (None, 80), ("b", 100)):
        mode = None if monitor is None else "min"
        checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor=monitor, mode=mode)
        resume = tmp_path / f"step-{newest:09}.ckpt" if newest else None
        fit(checkpoint, steps, logs=logs, resume=resume)
        newest = steps
        assert 10 in steps_in(tmp_path)
        assert (50 in steps_in(tmp_path)) == (steps > 30)
    assert steps_in(tmp_path) == [10, 50, 90, 100]
    assert best_of(tmp_path, "a").name == "step-000000010.ckpt"
    assert best_of(tmp_path, "b").name == "step-000000050.ckpt"


def test_one_object_serves_two_runs(tmp_path):
    checkpoint = Checkpoint(tmp_path / "a", every=10, monitor="loss")
    fit(checkpoint, 30, loss=lambda s: -100.0)
    checkpoint.folder = tmp_path / "b"
    fit(checkpoint, 20, loss=float)
    assert steps_in(tmp_path / "a") == [10, 20, 30]
    assert checkpoint.best_path == tmp_path / "b" / "step-000000010.ckpt"


def test_the_old_stay_until_the_new_is_read_back(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, every=10, keep=1)

    def damaging(path, *args, **kwargs):
        write_tree(path, *args, **kwargs)
        if path.name == "step-000000020.ckpt":
            spoil(path)

    monkeypatch.setattr("eqxmeta._checkpoint.run_files.write_tree", damaging)
    with pytest.raises(CheckpointCorrupt):
        fit(checkpoint, 30)
    load(tmp_path / "step-000000010.ckpt", state_at(0))


def test_a_failed_save_is_not_the_best(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor="loss")

    def fail(path, *args, **kwargs):
        if path.name == "step-000000020.ckpt":
            raise OSError(28, "No space left on device")
        write_tree(path, *args, **kwargs)

    monkeypatch.setattr("eqxmeta._checkpoint.run_files.write_tree", fail)
    with pytest.raises(OSError, match="No space"):
        fit(checkpoint, 30, loss=lambda s: -s)
    assert checkpoint.best_path == checkpoint.last_path == tmp_path / "step-000000010.ckpt"
    assert steps_in(tmp_path) == [10]


def test_what_somebody_else_wrote_meanwhile_is_not_overwritten(tmp_path):
    def logs(step):
        (tmp_path / "step-000000020.ckpt").write_text("of another process")

    with pytest.raises(FileExistsError, match="not overwritten"):
        fit(Checkpoint(tmp_path, every=10), 20, logs=logs)
    assert (tmp_path / "step-000000020.ckpt").read_text() == "of another process"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("every", 0), ("every", -1), ("every", 1.5), ("every", True), ("keep", 0), ("keep", 2.0),
        ("keep", True), ("monitor", ""), ("monitor", 3), ("mode", "best"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(tmp_path, argument, value):
    # Wrong types are refused by beartype here, and in our own words without it.
    with pytest.raises(Exception, match=argument):
        Checkpoint(tmp_path, **{"every": 10, argument: value})


def test_it_runs_after_the_others_and_leaves_files():
    checkpoint, counter = Checkpoint("nowhere", every=10), Counter()
    assert attach([checkpoint, counter]) == (counter, checkpoint)
    assert checkpoint.writes
