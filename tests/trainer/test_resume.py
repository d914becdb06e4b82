"""A run that is broken off and resumed is the run that never was: its state, callbacks, files."""

import builtins
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Callback, Checkpoint, EarlyStopping, Evaluate, TensorBoard

from ..boring import BoringModel, BoringStrategy, BoringTasks, Recorder, boring_fit, same_bits
from ..resume_run import everything, parts
from ..same_run import check_same_run, events_of, logged_steps

ROOT = Path(__file__).parents[2]


def start(folder, steps, *flags, hash_seed=0):
    """A process of its own; what it prints goes to `folder/out`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.resume_run", str(folder), str(steps), *flags]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    with open(folder / "out", "w") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)


def finish(folder, process, steps):
    assert process.wait(timeout=300) == 0, (folder / "out").read_text()
    assert (folder / "out").read_text().rstrip().endswith(f"finished {steps}")


@pytest.fixture(scope="module")
def broken_once(tmp_path_factory):
    """`(resumed, straight)`: fit(100), a new process, fit(200); and fit(200)."""
    resumed, straight = tmp_path_factory.mktemp("resumed"), tmp_path_factory.mktemp("straight")
    # Hashes of strings differ between processes, and with them the order of any set.
    whole = start(straight, 200, hash_seed=1)
    finish(resumed, start(resumed, 100, hash_seed=2), 100)
    finish(straight, whole, 200)
    finish(resumed, start(resumed, 200, hash_seed=3), 200)
    return resumed, straight


@pytest.mark.slow
def test_fit_200_equals_fit_100_and_a_new_process(broken_once):
    resumed, straight = broken_once
    assert "resumed at step 100" in (resumed / "out").read_text()
    assert "resumed" not in (straight / "out").read_text()
    check_same_run(resumed, straight, 200)


@pytest.mark.slow
@pytest.mark.optimised  # as the runs in other processes are
def test_a_run_in_this_process_equals_those_in_others(broken_once, tmp_path):
    strategy, model, tasks = parts(boring=False)
    trainer = em.Trainer(strategy, meta_batch_size=3, seed=1, steps_per_execution=9, summary=False)
    state = trainer.fit(model, tasks, 200)
    saved = em.load(broken_once[0] / "saved" / "step-000000200.ckpt", state)
    assert same_bits(saved, state)


@pytest.mark.slow
def test_tensorboard_itself_reads_every_step_once(broken_once):
    boards = [folder / "board" for folder in broken_once]
    assert events_of(boards[0]) == events_of(boards[1])
    assert logged_steps(boards[0]) == list(range(1, 201))
    assert logged_steps(boards[0], "eval/loss") == list(range(25, 201, 25))
    assert logged_steps(boards[0], "within_task/eval/loss/after_2") == list(range(25, 201, 25))


STEPS = 2000


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path_factory):
    straight, tmp_path = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("killed")
    whole = start(straight, STEPS, "--boring")
    kills = 0
    for attempt in range(4):
        process = start(tmp_path, STEPS, "--boring", hash_seed=attempt)
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and "running" not in (tmp_path / "out").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.6))
        finally:
            process.kill()
        # On a fast machine the last attempts may find nothing left to do.
        assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "out").read_text()
        kills += process.returncode != 0
    assert kills, "each attempt was over before it was killed: raise STEPS"
    finish(straight, whole, STEPS)
    finish(tmp_path, start(tmp_path, STEPS, "--boring"), STEPS)
    check_same_run(tmp_path, straight, STEPS)


# In this process, for what needs no other.


def saving(folder, every=10, **options):
    return Checkpoint(folder, every=every, **options)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resume_from_an_explicit_path(tmp_path):
    boring_fit(50, callbacks=[saving(tmp_path / "a", keep=None)])
    straight = boring_fit(50)
    before = contents(tmp_path)
    for path in (tmp_path / "a" / "step-000000020.ckpt", str(tmp_path / "a/step-000000030.ckpt")):
        recorder = Recorder()
        with pytest.warns(RuntimeWarning, match="not attached"):
            state = boring_fit(50, callbacks=[recorder], resume=path)
        assert recorder.metrics["step"].tolist() == list(range(int(str(path)[-7:-5]) + 1, 51))
        assert same_bits(state, straight)
    assert contents(tmp_path) == before


def test_resuming_opens_the_checkpoint_twice(tmp_path, monkeypatch):
    # Once to choose it among those of all callbacks, and once to load it; whoever else wants to
    # know what it says, such as the logs and `Checkpoint`, is told.
    def fit(steps):
        callbacks = everything(tmp_path, BoringTasks(), monitor="loss")
        return boring_fit(steps, callbacks=callbacks, resume="auto")

    fit(50)
    opened = []

    def counting(function):
        def counted(file, *args, **kwargs):
            opened.append(str(file))
            return function(file, *args, **kwargs)

        return counted

    for module in (builtins, io, os):
        monkeypatch.setattr(module, "open", counting(module.open))
    fit(60)
    newest = str(tmp_path / "saved" / "step-000000050.ckpt")
    assert opened.count(newest) == 2


def test_resume_auto_without_a_checkpoint_starts(tmp_path):
    seen = []
    recorder = Recorder(act=lambda hook, step, run: seen.append((run.start, run.resuming)))
    state = boring_fit(30, callbacks=[saving(tmp_path / "new"), recorder], resume="auto")
    assert same_bits(state, boring_fit(30))
    assert set(seen) == {(0, True)}


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path):
    def fit():
        folder = tmp_path / "run"
        return boring_fit(50, callbacks=everything(folder, BoringTasks()), resume="auto")

    first, before = fit(), contents(tmp_path)
    again = fit()
    assert same_bits(first, again)
    after = contents(tmp_path)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    # TensorBoard marks each start of a process.
    assert all("tfevents" in path.name for path in changed)
    assert logged_steps(tmp_path / "run/board") == list(range(1, 51))


def test_states_of_callbacks_come_back_before_the_run_starts(tmp_path):
    class Stateful(Recorder):
        def state_dict(self):
            return {"seen": len(self.events), "nested": {"a": [1, None, "x", 1.5]}}

        def load_state_dict(self, state):
            self.events.append((self.name, "load_state_dict", state))

    boring_fit(20, callbacks=[Stateful("s"), saving(tmp_path)], steps_per_execution=10)
    stateful = Stateful("s")
    boring_fit(30, callbacks=[stateful, saving(tmp_path)], resume="auto")
    # At step 20 it had seen the start and two chunks.
    state = {"seen": 3, "nested": {"a": [1, None, "x", 1.5]}}
    assert stateful.events[:2] == [("s", "load_state_dict", state), ("s", "on_fit_start", 20)]


def test_a_resume_that_is_refused_leaves_nothing_to_the_next_run(tmp_path):
    class Refusing(Callback):
        refuses = False

        def refuse(self, run):
            if self.refuses:
                raise FileExistsError("mine")

    # Never better by so much: it stops at the second look.
    stopping = EarlyStopping("seen", patience=2, mode="min", every=1, min_delta=100.0)
    refusing, folder = Refusing(), tmp_path / "saved"
    callbacks = [stopping, refusing, saving(folder, every=1)]
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2, callbacks=callbacks, summary=False)
    first = trainer.fit(BoringModel(), BoringTasks(), 50)
    assert int(first.step) == 3
    refusing.refuses = True
    with pytest.raises(FileExistsError, match="mine"):
        trainer.fit(BoringModel(), BoringTasks(), 50, resume="auto")
    refusing.refuses = False
    folder.rename(tmp_path / "moved")
    assert same_bits(trainer.fit(BoringModel(), BoringTasks(), 50), first)


def test_early_stopping_goes_on_counting(tmp_path):
    class Worse(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            return new, {**metrics, "loss": state.step.astype(float)}

    def fit(steps):
        callbacks = [EarlyStopping("loss", patience=5, every=10), saving(tmp_path)]
        return int(boring_fit(steps, strategy=Worse(), callbacks=callbacks, resume="auto").step)

    assert fit(30) == 30
    assert fit(1000) == 60  # the best was at 10
    assert fit(1000) == 60  # what has stopped does not go on because it is resumed


def test_a_callback_that_joins_later_starts_fresh(tmp_path):
    boring_fit(20, callbacks=[saving(tmp_path)])
    late = EarlyStopping("loss", patience=5, every=10)
    assert int(boring_fit(30, callbacks=[saving(tmp_path), late], resume="auto").step) == 30


class WideTasks(eqx.Module):
    """Five inputs instead of three."""

    def sample(self, key):
        task = BoringTasks().sample(key)
        return jax.tree.map(lambda x: x if x.shape[1] == 1 else x[:, [0, 1, 2, 0, 1]], task)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed=0.*seed=7"),
        ({"meta_batch_size": 4}, "meta_batch_size=2.*meta_batch_size=4"),
        (
            {"strategy": em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))},
            "strategy='BoringStrategy'.*strategy='MAML'",
        ),
        (
            {"tasks": WideTasks()},
            r"tasks=BoringTasks.*tasks=WideTasks",
        ),
        (
            {"model": BoringModel(size=5)},
            r"\.model\.weight is float32\[3\].*float32\[5\]",
        ),
        (
            {"model": eqx.nn.Linear(3, 1, key=jax.random.key(0))},
            "model='BoringModel'.*model='Linear'",
        ),
        ({"seed": 7, "meta_batch_size": 4}, "meta_batch_size=2, seed=0"),
    ],
)
def test_the_checkpoint_of_another_run(tmp_path, change, named):
    boring_fit(20, callbacks=[saving(tmp_path)])
    before = contents(tmp_path)
    recorder = Recorder()
    with pytest.raises(em.CheckpointMismatch, match=f"(?s){named}"):
        boring_fit(30, callbacks=[saving(tmp_path), recorder], resume="auto", **change)
    assert recorder.events == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (em.InnerLoop(optax.sgd(0.1), 2), r"strategy\.inner\.steps=1.*strategy\.inner\.steps=2"),
        (
            em.InnerLoop(optax.sgd(0.1), 1, "reverse"),
            "gradient='mixed'.*gradient='reverse'",
        ),
        (em.InnerLoop(optax.sgd(0.1), 1, adapt=lambda m: m.bias), "adapts=None.*adapts='bias'"),
    ],
)
def test_the_checkpoint_of_another_inner_loop(tmp_path, inner, named):
    def fit(inner, resume):
        strategy = em.Reptile(em.losses.mse, inner, optax.sgd(0.1))
        return boring_fit(2, strategy=strategy, callbacks=[saving(tmp_path)], resume=resume)

    fit(em.InnerLoop(optax.sgd(0.1), 1), None)
    with pytest.raises(em.CheckpointMismatch, match=f"(?s){named}"):
        fit(inner, "auto")


def test_the_checkpoint_of_another_setting_of_the_strategy(tmp_path):
    def fit(batch_size, task_chunk, resume):
        options = {"batch_size": batch_size, "task_chunk": task_chunk}
        inner = em.InnerLoop(optax.sgd(0.1), 1)
        strategy = em.Reptile(em.losses.mse, inner, optax.sgd(0.1), **options)
        return boring_fit(2, strategy=strategy, callbacks=[saving(tmp_path)], resume=resume)

    fit(2, 1, None)
    fit(2, 2, "auto")  # another layout of the same computation
    with pytest.raises(em.CheckpointMismatch, match=r"(?s)batch_size=2.*batch_size=3.*load_model"):
        fit(3, 1, "auto")


def test_the_model_differs_and_so_does_its_optimizers_state(tmp_path):
    def fit(size, resume):
        strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optax.adam(0.1))
        model = eqx.nn.MLP(3, 1, size, 1, key=jax.random.key(0))
        trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=[saving(tmp_path)])
        return trainer.fit(model, BoringTasks(), 2, resume=resume)

    fit(4, None)
    with pytest.raises(em.CheckpointMismatch) as error:
        fit(5, "auto")
    told = str(error.value)
    assert "layers[0].weight is float32[4, 3] in the file, float32[5, 3] in this run" in told
    assert "`like`" not in told
    assert ".opt_state" not in told
    assert "6 more, of the optimizer's state" in told


def test_the_checkpoint_of_another_outer_optimizer(tmp_path):
    def fit(optimizer, resume):
        inner = em.InnerLoop(optax.sgd(0.1), 1)
        strategy = em.Joint(em.losses.mse, inner, optimizer)
        return boring_fit(2, strategy=strategy, callbacks=[saving(tmp_path)], resume=resume)

    fit(optax.sgd(0.1), None)
    # Also one whose state has the same arrays, here none.
    clipped = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    for other, named in [(optax.adam(0.1), "scale_by_adam"), (clipped, r"clip\.")]:
        with pytest.raises(em.CheckpointMismatch, match=rf"(?s)strategy\.optimizer.*{named}"):
            fit(other, "auto")
    fit(optax.sgd(0.2), "auto")  # another rate is taken


def test_a_file_that_was_not_saved_by_a_run(tmp_path):
    em.save(tmp_path / "model", boring_fit(5))
    with pytest.raises(em.CheckpointMismatch, match="strategy=None"):
        boring_fit(10, resume=tmp_path / "model")
    with pytest.raises(em.CheckpointNotFound):
        boring_fit(10, resume=tmp_path / "nothing")


def damage(path, how):
    data = path.read_bytes()
    if how == "flipped":
        middle = len(data) // 3
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}[how]])


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, how):
    boring_fit(30, callbacks=[saving(tmp_path)])
    damage(tmp_path / "step-000000030.ckpt", how)
    recorder = Recorder()
    with pytest.warns(RuntimeWarning) as warned:
        state = boring_fit(40, callbacks=[saving(tmp_path), recorder], resume="auto")
    assert any("damaged" in str(w.message) and "000000030" in str(w.message) for w in warned)
    assert recorder.events[0] == ("recorder", "on_fit_start", 20)
    assert same_bits(state, boring_fit(40))
    # The damaged file is set aside, not overwritten: it may be all that is left of something.
    assert (tmp_path / "step-000000030.ckpt.stale").exists()
    assert same_bits(em.load(tmp_path / "step-000000040.ckpt", state), state)


@pytest.mark.parametrize("meta", [None, {"step": 99}])
def test_a_foreign_file_under_the_name_of_a_checkpoint_is_told_of(tmp_path, meta):
    boring_fit(10, callbacks=[saving(tmp_path)])
    em.save(tmp_path / "step-000000099.ckpt", {"a": np.ones(3)}, meta=meta)
    with pytest.raises(em.CheckpointMismatch, match="000000099"):
        boring_fit(20, callbacks=[saving(tmp_path)], resume="auto")


@pytest.mark.parametrize(
    ("broken", "step"), [("manifest.json", 20), ("leaves/00000.npy", 20), ("manifest.json", 10)]
)
def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(tmp_path, monkeypatch, broken, step):
    boring_fit(20, callbacks=[saving(tmp_path)])
    opened = zipfile.ZipFile.open

    def failing(self, name, *args):
        if self.fp.name.endswith(f"{step}.ckpt") and name == broken:
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", failing)
    recorder, start = Recorder(), 30 - step
    with pytest.warns(RuntimeWarning) as warned:
        boring_fit(start + 5, callbacks=[recorder, saving(tmp_path)], resume="auto")
    told = str(warned[0].message)
    assert "damaged" in told and f"{step}.ckpt" in told and "Input/output error" in told
    assert recorder.steps_of("on_fit_start") == [start]


def test_only_damaged_checkpoints(tmp_path):
    boring_fit(30, callbacks=[saving(tmp_path)])
    for path in tmp_path.iterdir():
        damage(path, "flipped")
    before = contents(tmp_path)
    recorder = Recorder()
    with pytest.warns(RuntimeWarning, match="damaged"), pytest.raises(em.CheckpointCorrupt):
        boring_fit(40, callbacks=[saving(tmp_path), recorder], resume="auto")
    assert recorder.events == []
    assert contents(tmp_path) == before


def test_an_explicit_path_that_is_damaged(tmp_path):
    boring_fit(20, callbacks=[saving(tmp_path)])
    path = tmp_path / "step-000000020.ckpt"
    damage(path, "flipped")
    with pytest.raises(em.CheckpointCorrupt):
        boring_fit(40, resume=path)


def writers(folder):
    return {
        "checkpoint": lambda: saving(folder / "saved"),
        "jsonl": lambda: JSONL(folder / "log.jsonl"),
        "tensorboard": lambda: TensorBoard(folder / "board"),
    }


@pytest.mark.parametrize("which", [["checkpoint"], ["jsonl"], ["tensorboard"], None])
def test_a_fresh_run_does_not_touch_what_an_earlier_one_left(tmp_path, which):
    make = writers(tmp_path)
    callbacks = [make[name]() for name in which or make]
    boring_fit(20, callbacks=[*callbacks, Evaluate(BoringTasks(), every=10, num_tasks=2)])
    before = contents(tmp_path)
    assert before
    # New objects, and those that wrote the files.
    for again in ([make[name]() for name in which or make], callbacks):
        recorder = Recorder()
        with pytest.raises(FileExistsError, match=r"(?s)Received:.*Expected:.*resume"):
            boring_fit(20, callbacks=[*again, recorder])
        assert recorder.rows == []
        assert contents(tmp_path) == before


def test_a_fresh_run_that_is_refused_leaves_no_new_files_either(tmp_path):
    # Else the next attempt, with another folder for the checkpoints, is refused over the log.
    boring_fit(20, callbacks=[saving(tmp_path / "saved")])
    before = contents(tmp_path)
    for _ in range(2):
        callbacks = [make() for make in writers(tmp_path).values()]
        with pytest.raises(FileExistsError, match="saved"):
            boring_fit(20, callbacks=callbacks)
    moved = {**writers(tmp_path), "checkpoint": lambda: saving(tmp_path / "elsewhere")}
    boring_fit(20, callbacks=[make() for make in moved.values()])
    assert {path: contents(tmp_path)[path] for path in before} == before


def test_the_resumed_trainer_may_be_the_same_object(tmp_path):
    callbacks = everything(tmp_path, BoringTasks(), monitor="loss")
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2, callbacks=callbacks, summary=False)
    trainer.fit(BoringModel(), BoringTasks(), 30)
    state = trainer.fit(BoringModel(), BoringTasks(), 60, resume="auto")
    assert same_bits(state, boring_fit(60))
    log = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 61))
    assert logged_steps(tmp_path / "board") == list(range(1, 61))


@pytest.mark.parametrize("end", [30, 33])
def test_a_run_that_was_interrupted_is_resumed_where_it_ended(tmp_path, end):
    # Its last file is not at a multiple of `every`, and the next ones are again.
    def interrupted():
        return everything(tmp_path, BoringTasks(), monitor="loss")

    def stop(hook, step, run):
        if hook == "on_step_end" and step == end:
            raise KeyboardInterrupt

    callbacks = [*interrupted(), Recorder(every=3, act=stop)]
    assert int(boring_fit(60, callbacks=callbacks).step) == end
    state = boring_fit(60, callbacks=interrupted(), resume="auto")
    assert same_bits(state, boring_fit(60))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if "eval/loss" in row] == [25, 50, 60]
    assert [row["step"] for row in rows if "at_end" in row] == [60]
    saved = sorted(path.name for path in (tmp_path / "saved").glob("*.ckpt"))
    assert saved[-2:] == ["step-000000050.ckpt", "step-000000060.ckpt"]


def test_a_resumed_run_may_end_at_the_same_step_by_a_stop(tmp_path):
    # No step is taken: nothing is saved over the file that it came from.
    boring_fit(20, callbacks=[saving(tmp_path)])
    before = contents(tmp_path)
    stop = Recorder(act=lambda hook, step, run: run.request_stop("at once"))
    state = boring_fit(50, callbacks=[stop, saving(tmp_path)], resume="auto")
    assert int(state.step) == 20
    assert contents(tmp_path) == before
    assert np.all(np.isfinite(state.model.weight))


def test_the_newest_file_of_several_folders_is_resumed(tmp_path):
    def savers():
        return [
            Checkpoint(tmp_path / "a", every=10, name="a"),
            Checkpoint(tmp_path / "b", every=4, name="b"),
        ]

    stop = Recorder("stop", every=13, act=lambda h, step, run: step == 13 and run.request_stop(""))
    boring_fit(40, callbacks=[*savers(), stop])
    for path in (tmp_path / "a").glob("*13.ckpt"):
        path.unlink()  # the folder whose callback comes first is behind
    recorder = Recorder("recorder")
    state = boring_fit(40, callbacks=[*savers(), recorder], resume="auto")
    assert recorder.metrics["step"][0] == 14
    assert same_bits(state, boring_fit(40))


def test_the_best_is_known_after_a_resume_from_another_folder(tmp_path):
    def savers():
        a = Checkpoint(tmp_path / "a", every=10, keep=1, monitor="index", mode="min", name="a")
        return [a, Checkpoint(tmp_path / "b", every=7, keep=1, name="b")]

    boring_fit(28, callbacks=savers())
    (tmp_path / "a" / "step-000000028.ckpt").unlink()  # as if killed right after b's
    again = savers()
    boring_fit(40, callbacks=again, resume="auto")
    assert again[0].best_path == tmp_path / "a" / "step-000000010.ckpt"
    saved = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert saved == ["step-000000010.ckpt", "step-000000040.ckpt"]
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_a_refused_run_leaves_the_log_alone(tmp_path):
    first, path = JSONL(tmp_path / "log.jsonl"), tmp_path / "log.jsonl"
    boring_fit(5, callbacks=[first, Checkpoint(tmp_path / "saved", every=5)])
    boring_fit(15, callbacks=[JSONL(path), Checkpoint(tmp_path / "saved", every=5)], resume="auto")
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        boring_fit(5, callbacks=[first])  # the same object: it remembers where it once ended
    assert path.read_bytes() == before


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.filterwarnings("ignore:(?s).*lacks (rows|events):RuntimeWarning")
def test_the_log_of_another_run_is_set_aside(tmp_path, attached):
    def logs(name):
        return [JSONL(tmp_path / f"{name}.jsonl"), TensorBoard(tmp_path / name, every=1)]

    boring_fit(20, callbacks=[*logs("other"), saving(tmp_path / "others")], seed=7)
    rows = (tmp_path / "other.jsonl").read_bytes()
    before = contents(tmp_path / "other")
    mine = logs("mine") if attached else []
    boring_fit(6, callbacks=[*mine, saving(tmp_path / "saved")])
    boring_fit(10, callbacks=[*mine, saving(tmp_path / "saved")], resume="auto")  # its own
    with pytest.warns(RuntimeWarning, match="is of another run") as warned:
        boring_fit(12, callbacks=[*logs("other"), saving(tmp_path / "saved")], resume="auto")
    assert sum("is of another run" in str(warning.message) for warning in warned) == 2
    assert (tmp_path / "other.jsonl.stale").read_bytes() == rows
    assert contents(tmp_path / "other").items() > before.items()
    assert logged_steps(tmp_path / "other") == [11, 12]  # those of the other run are hidden
    (log,) = [path for path in tmp_path.glob("other.jsonl")]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [11, 12]


def test_a_log_under_another_name_goes_on(tmp_path):
    def logs(name):
        return [
            JSONL(tmp_path / "log.jsonl", name=name and f"{name} log"),
            TensorBoard(tmp_path / "board", every=1, name=name and f"{name} board"),
        ]

    boring_fit(4, callbacks=[*logs(None), saving(tmp_path / "saved")])
    boring_fit(6, callbacks=[*logs("mine"), saving(tmp_path / "saved")], resume="auto")
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 7))
    assert logged_steps(tmp_path / "board") == list(range(1, 7))
