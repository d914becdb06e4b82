"""What is moved, replaced or emptied under a run: nobody's file is touched, and the run says so."""

import os
import shutil
import threading

import pytest

import eqxmeta as em
from eqxmeta._checkpoint.run_files import id_of
from eqxmeta._files.lock import locked
from eqxmeta.callbacks import JSONL, Checkpoint, TensorBoard

from ..boring import Recorder, at, boring_fit


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def writer(kind, folder):
    if kind == "checkpoint":
        return Checkpoint(folder, every=10, keep=1)
    return JSONL(folder / "log.jsonl") if kind == "jsonl" else TensorBoard(folder, every=1)


def moved(folder):
    folder.rename(folder.with_name("away"))


def removed(folder):
    shutil.rmtree(folder)


def linked_elsewhere(folder):
    moved(folder)
    folder.with_name("other").mkdir()
    folder.symlink_to("other")


def unlocked(folder):
    for lock in folder.glob(".*lock"):
        lock.unlink()


@pytest.mark.parametrize("exchange", [moved, removed, linked_elsewhere, unlocked])
@pytest.mark.parametrize("successor", [True, False])
@pytest.mark.parametrize("kind", ["checkpoint", "jsonl", "tensorboard"])
def test_a_folder_that_is_exchanged(tmp_path, kind, successor, exchange):
    folder, found = tmp_path / "out", {}
    callback = writer(kind, folder)

    def act(run):
        callback.state_dict()  # waits for the file that is being written
        exchange(folder)
        if successor and exchange is not unlocked:
            boring_fit(10, callbacks=[writer(kind, folder)])
        found.update(contents(tmp_path))

    first = Recorder(act=at("on_chunk_end", 15, act))
    with (
        pytest.raises(em.CheckpointInUse, match=r"(?s)is in use.*Received.*Expected"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(tmp_path)
        boring_fit(40, callbacks=[first, callback], steps_per_execution=5)
    assert contents(tmp_path) == found


@pytest.mark.parametrize("call", range(4))
def test_a_folder_that_is_exchanged_while_a_checkpoint_is_written(tmp_path, monkeypatch, call):
    """At each call in turn that waits for the disk."""
    folder, fsync, calls, found = tmp_path / "out", os.fsync, [], {}

    def exchanging(descriptor):
        fsync(descriptor)
        if threading.current_thread().name == "eqxmeta-checkpoint":
            calls.append(descriptor)
            if len(calls) == call + 1:
                folder.rename(tmp_path / "away")
                boring_fit(10, callbacks=[Checkpoint(folder, every=5)])
                found.update(contents(folder))

    monkeypatch.setattr(os, "fsync", exchanging)
    callbacks = [JSONL(tmp_path / "log"), Checkpoint(folder, every=10, keep=1)]
    with pytest.raises((em.CheckpointInUse, FileNotFoundError)):
        boring_fit(40, callbacks=callbacks, steps_per_execution=5)
    assert contents(folder) == found and len(found) == 2


def renamed(log):
    log.rename(log.with_name("old"))


def replaced(log):
    data = log.read_bytes()
    log.unlink()
    log.write_bytes(data)


def swapped(log):
    log.with_name("new").write_bytes(log.read_bytes())
    log.with_name("new").rename(log)


def emptied(log):
    log.write_bytes(b"")


def shortened(log):
    log.write_bytes(log.read_bytes()[:-5])


@pytest.mark.parametrize("exchange", [renamed, replaced, swapped, emptied, shortened])
@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
def test_a_log_that_is_exchanged(tmp_path, kind, exchange):
    found = {}

    def act(run):
        (log,) = (path for path in tmp_path.iterdir() if path.name[0] != ".")
        exchange(log)
        found.update(contents(tmp_path))

    first = Recorder(act=at("on_chunk_end", 15, act))
    with pytest.raises(em.CheckpointInUse, match=r"(?s)is in use.*Received"):
        boring_fit(40, callbacks=[first, writer(kind, tmp_path)], steps_per_execution=5)
    for name, data in contents(tmp_path).items():
        assert found[name] == data


def test_a_checkpoint_that_another_took_the_place_of_stays(tmp_path):
    foreign, ours = tmp_path / "foreign", tmp_path / "ours"
    boring_fit(10, callbacks=[Checkpoint(foreign, every=10)])
    path = foreign / "step-000000010.ckpt"
    callback = Checkpoint(ours, every=10, keep=1)

    def act(run):
        callback.state_dict()  # waits for the file that is being written
        shutil.copy(path, ours)

    first = Recorder(act=at("on_chunk_end", 15, act))
    with pytest.warns(RuntimeWarning, match=r"step-000000010\.ckpt is not removed"):
        boring_fit(30, callbacks=[first, callback], steps_per_execution=5)
    assert sorted(p.name for p in ours.iterdir()) == ["step-000000010.ckpt", "step-000000030.ckpt"]
    assert id_of(ours / "step-000000010.ckpt") == id_of(path) != id_of(ours / "step-000000030.ckpt")


def test_the_check_of_a_lock_asks_for_the_folder_that_is_there_now(tmp_path):
    with locked(tmp_path / "a") as check:
        check()
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(em.CheckpointInUse):
            check()
        with locked(tmp_path / "a") as second:
            second()
        (tmp_path / "b").rename(tmp_path / "a")
        check()
    assert list(tmp_path.iterdir()) == []


def test_an_exchange_is_an_error_also_where_errors_of_the_disk_are_none(tmp_path):
    move = Recorder(act=at("on_chunk_end", 15, lambda run: moved(tmp_path / "out")))
    with pytest.raises(em.CheckpointInUse):
        boring_fit(40, callbacks=[move, Checkpoint(tmp_path / "out", every=10, on_error="warn")])
