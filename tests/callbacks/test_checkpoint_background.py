"""The file is written while the run goes on: what it holds, and what becomes of its errors."""

import os
import signal
import threading

import pytest

import eqxmeta as em
from eqxmeta._checkpoint import run_files as _checkpoint_files
from eqxmeta._checkpoint.save_load import read_manifest
from eqxmeta._files.background import Background
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringStrategy, Recorder, at, boring_fit, same_bits


class Gate:
    """`save`, which waits until it is opened, and fails at the steps in `failing`."""

    def __init__(self, monkeypatch, *, opened=True, failing=()):
        self.open = threading.Event()
        self.began = []
        self.failing = failing
        self._save = _checkpoint_files.write_tree
        if opened:
            self.open.set()
        monkeypatch.setattr(_checkpoint_files, "write_tree", self)

    def __call__(self, path, state, meta, before):
        assert threading.current_thread() is not threading.main_thread()
        self.began.append(meta["step"])
        assert self.open.wait(60)
        if meta["step"] in self.failing:
            raise OSError(28, "No space left on device")
        self._save(path, state, meta, before)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def steps_in(folder):
    return sorted(int(path.name[5:-5]) for path in folder.glob("step-*.ckpt"))


class Counter(Recorder):
    def state_dict(self):
        return {"rows": sum(len(rows["step"]) for rows in self.rows)}


def test_the_run_goes_on_while_the_file_is_written(tmp_path, monkeypatch):
    gate, seen = Gate(monkeypatch, opened=False), []

    def act(hook, step, run):
        if hook == "on_chunk_end":
            seen.append((step, steps_in(tmp_path)))
            if step == 20:
                gate.open.set()

    checkpoint = Checkpoint(tmp_path, every=10, keep=None)
    callbacks = [Counter(act=act), checkpoint]
    boring_fit(40, callbacks=callbacks, steps_per_execution=5)
    assert seen[:4] == [(5, []), (10, []), (15, []), (20, [])]
    assert gate.began == steps_in(tmp_path) == [10, 20, 30, 40]
    # What is in the file is of its step, not of the moment at which it was written.
    for path, step in zip(sorted(tmp_path.iterdir()), gate.began, strict=True):
        meta = read_manifest(path)["meta"]
        assert (meta["step"], meta["callbacks"]["recorder"]["rows"]) == (step, step)
        state = boring_fit(step)
        assert same_bits(em.load(path, state), state)


def test_a_state_that_goes_on_changing_is_saved_as_it_was(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, opened=False)

    steps = []

    class Live(Recorder):
        def state_dict(self):
            return {"steps": steps}

    live = Live(act=lambda hook, step, run: steps.append(step))
    opener = at("on_chunk_end", 20, lambda run: gate.open.set())
    callbacks = [live, Recorder("opener", act=opener), Checkpoint(tmp_path, every=10)]
    boring_fit(20, callbacks=callbacks, steps_per_execution=5)
    meta = read_manifest(tmp_path / "step-000000010.ckpt")["meta"]
    assert meta["callbacks"]["recorder"]["steps"] == [0, 5, 10]


def test_a_state_that_is_not_json_is_refused_at_once(tmp_path):
    class Wrong(Recorder):
        def state_dict(self):
            return {"value": {1, 2}}

    wrong = Wrong()
    with pytest.raises(TypeError, match=r"recorder.*value"):
        boring_fit(40, callbacks=[wrong, Checkpoint(tmp_path, every=10)], steps_per_execution=5)
    assert wrong.metrics["step"][-1] == 10


def test_one_file_is_written_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, opened=False)
    timer = threading.Timer(0.3, gate.open.set)
    waiting = []

    def act(hook, step, run):
        if hook == "on_step_end" and step == 1:
            timer.start()
        elif hook == "on_chunk_end" and step > 2:
            waiting.append(gate.open.is_set())

    callbacks = [Recorder(every=1, act=act), Checkpoint(tmp_path, every=1, keep=None)]
    boring_fit(5, callbacks=callbacks)
    timer.join()
    assert waiting == [True] * 3  # the save of step 2 waited for that of step 1
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_an_error_ends_the_run_at_the_next_hook(tmp_path, monkeypatch):
    Gate(monkeypatch, failing=[20])
    recorder = Recorder()
    callbacks = [recorder, Checkpoint(tmp_path, every=10)]
    with pytest.raises(OSError, match="No space left") as caught:
        boring_fit(1000, callbacks=callbacks)
    assert "step-000000020.ckpt" in caught.value.__notes__[0]
    assert recorder.errors == [caught.value]
    assert steps_in(tmp_path) == [10]
    assert 20 <= recorder.metrics["step"][-1] <= 30


def test_an_error_at_the_last_step_is_raised_by_fit(tmp_path, monkeypatch):
    Gate(monkeypatch, failing=[30])
    with pytest.raises(OSError, match="No space left"):
        boring_fit(30, callbacks=[Checkpoint(tmp_path, every=10)])
    assert steps_in(tmp_path) == [10, 20]


def test_an_error_is_a_warning_for_those_who_want_it(tmp_path, monkeypatch):
    Gate(monkeypatch, failing=[20, 30])
    checkpoint = Checkpoint(
        tmp_path, every=10, keep=2, monitor="index", mode="min", on_error="warn"
    )
    with pytest.warns(RuntimeWarning, match="training goes on") as warned:
        state = boring_fit(50, callbacks=[checkpoint])
    told = [str(w.message) for w in warned if "No space left" in str(w.message)]
    assert ["000000020" in told[0], "000000030" in told[1], len(told)] == [True, True, 2]
    assert same_bits(state, boring_fit(50))
    assert steps_in(tmp_path) == [10, 40, 50]  # 10 is the best
    assert checkpoint.best_path == tmp_path / "step-000000010.ckpt"


def test_the_end_tries_again_what_failed_at_the_same_step(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, failing=[20])
    save = gate._save

    def once(path, state, meta, before):
        gate.failing = []
        save(path, state, meta, before)

    gate._save = once
    with pytest.warns(RuntimeWarning, match=r"step-000000020\.ckpt was not written"):
        boring_fit(20, callbacks=[Checkpoint(tmp_path, every=20, on_error="warn")])
    assert gate.began == [20, 20]


def test_a_file_that_does_not_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    save = _checkpoint_files.write_tree

    def rotten(path, state, meta, before):
        save(path, state, meta, before)
        if meta["step"] == 20:
            data = bytearray(path.read_bytes())
            data[300] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(_checkpoint_files, "write_tree", rotten)
    checkpoint = Checkpoint(tmp_path, every=10, keep=1, on_error="warn")
    with pytest.warns(RuntimeWarning, match="CheckpointCorrupt"):
        boring_fit(20, callbacks=[checkpoint])
    assert checkpoint.last_path == tmp_path / "step-000000010.ckpt"
    assert steps_in(tmp_path) == [10]
    assert len(list(tmp_path.glob("step-000000020.ckpt.stale*"))) == 2  # the end tried again


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_does_not_take_the_file_for_written(tmp_path, monkeypatch):
    save, opened = _checkpoint_files.write_tree, threading.Event()
    checkpoint = Checkpoint(tmp_path, every=10, keep=1, monitor="index", mode="max")

    def late(path, state, meta, before):
        assert meta["step"] == 10 or opened.wait(60)
        save(path, state, meta, before)

    def fork(run):
        child = os.fork()
        if not child:
            signal.alarm(60)  # the end, if it waits
            best = checkpoint.state_dict()["best_step"]
            seen = best, checkpoint.last_path.name, steps_in(tmp_path)
            os._exit(0 if seen == (10, "step-000000010.ckpt", [10]) else 1)
        _, status = os.waitpid(child, 0)
        statuses.append(status)
        opened.set()

    statuses = []
    monkeypatch.setattr(_checkpoint_files, "write_tree", late)
    forking = Recorder(act=at("on_chunk_end", 21, fork))
    boring_fit(25, callbacks=[forking, checkpoint], steps_per_execution=5)
    # That of step 20 is the best of those from which a longer run would go on.
    assert statuses == [0] and steps_in(tmp_path) == [20, 25]


def error_of(run):
    raise ZeroDivisionError("of the user")


def twice_interrupted(run):
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [error_of, twice_interrupted])
def test_a_run_that_dies_finishes_the_file_first(tmp_path, monkeypatch, act):
    gate = Gate(monkeypatch, opened=False)
    timer = threading.Timer(0.3, gate.open.set)

    def fail(run):
        timer.start()
        act(run)

    recorder = Recorder(act=at("on_chunk_end", 11, fail))
    callbacks = [recorder, Checkpoint(tmp_path, every=10)]
    if act is error_of:
        with pytest.raises(ZeroDivisionError):
            boring_fit(30, callbacks=callbacks, steps_per_execution=5)
        assert steps_in(tmp_path) == [10]
    else:
        end = int(boring_fit(30, callbacks=callbacks, steps_per_execution=5).step)
        assert steps_in(tmp_path) == [10, end]
    for step in steps_in(tmp_path):
        state = boring_fit(step)
        assert same_bits(em.load(tmp_path / f"step-{step:09}.ckpt", state), state)
    timer.join()


def test_an_interrupt_while_an_error_is_told_leaves_no_thread_and_no_lock(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, opened=False)
    timer = threading.Timer(0.3, gate.open.set)
    checkpoint = Checkpoint(tmp_path, every=10)

    def interrupted(run, error):
        timer.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "on_exception", interrupted)
    failing = Recorder(act=at("on_chunk_end", 11, error_of))
    with pytest.raises(KeyboardInterrupt):
        boring_fit(30, callbacks=[failing, checkpoint], steps_per_execution=5)
    assert gate.open.is_set() and steps_in(tmp_path) == [10]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    timer.join()
    checkpoint = Checkpoint(tmp_path, every=10)
    boring_fit(20, callbacks=[checkpoint], resume="auto")


@pytest.mark.parametrize("nan_loss", [-1, 16])
def test_the_last_state_is_saved_although_the_file_before_failed(tmp_path, monkeypatch, nan_loss):
    gate = Gate(monkeypatch, opened=False, failing=[10])
    opener = Recorder(act=at("on_exception", 0, lambda run: gate.open.set()))
    if nan_loss < 0:
        monkeypatch.setattr(opener, "secure", lambda run: gate.open.set())
    callbacks = [opener, Checkpoint(tmp_path, every=10)]
    with pytest.raises((OSError, em.NonFiniteError)) as caught:
        steps = 15 if nan_loss < 0 else 18
        boring_fit(steps, strategy=BoringStrategy(nan_loss=nan_loss), callbacks=callbacks)
    told = str(caught.value) if nan_loss < 0 else caught.value.__notes__[0]
    assert "No space left" in told
    assert steps_in(tmp_path) == [15]


def test_the_error_of_a_file_is_added_to_that_of_the_run(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, opened=False, failing=[10])

    def fail(run):
        gate.open.set()
        raise ZeroDivisionError

    callbacks = [Recorder(act=at("on_chunk_end", 11, fail)), Checkpoint(tmp_path, every=10)]
    with pytest.raises(ZeroDivisionError) as caught:
        boring_fit(30, callbacks=callbacks, steps_per_execution=5)
    assert "No space left on device" in caught.value.__notes__[0]


def test_the_state_of_one_checkpoint_in_the_file_of_another(tmp_path, monkeypatch):
    # However long the first one's disk takes, the second's file says what the first one has.
    gate = Gate(monkeypatch, opened=False)
    threading.Timer(0.3, gate.open.set).start()
    savers = [
        Checkpoint(tmp_path / "a", every=10, monitor="index", mode="max"),
        Checkpoint(tmp_path / "b", every=10, name="b"),
    ]
    boring_fit(10, callbacks=savers)
    meta = read_manifest(tmp_path / "b" / "step-000000010.ckpt")["meta"]
    assert meta["callbacks"]["Checkpoint"]["best_step"] == 10


@pytest.mark.parametrize("where", [(threading.Thread, "start"), (Background, "start")])
def test_a_file_that_was_never_begun_does_not_cost_an_older_one(tmp_path, monkeypatch, where):
    start, calls = getattr(*where), []

    def fails(self, *job):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        start(self, *job)

    begin = at("on_step_end", 10, lambda run: monkeypatch.setattr(*where, fails))
    checkpoint = Checkpoint(tmp_path, every=10, keep=1)
    with pytest.raises(MemoryError):
        boring_fit(40, callbacks=[Recorder(every=10, act=begin), checkpoint])
    monkeypatch.undo()
    assert checkpoint.last_path == tmp_path / "step-000000020.ckpt"
    assert steps_in(tmp_path) == [20]
