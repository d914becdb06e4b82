"""One owner a folder: refused to all others, in this process and in others, alive or dead."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import eqxmeta as em
from eqxmeta._files.lock import locked
from eqxmeta.callbacks import JSONL, AdaptationPlot, Callback, Checkpoint, TensorBoard

from ..boring import Recorder, at, boring_fit, same_bits

ROOT = Path(__file__).parents[2]
NAME = ".lock"
OWNER = """
import sys, pathlib
from eqxmeta._files.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner():
    """Starts processes that own a folder until they are told, or killed."""
    processes = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_folder_of_another_process_is_refused_by_its_number(owner, tmp_path):
    process = owner(tmp_path)
    with (
        pytest.raises(
            em.CheckpointInUse, match=rf"(?s)Received: .*process {process.pid} .*Expected:"
        ),
        locked(tmp_path),
    ):
        raise AssertionError("two owners")
    assert os.listdir(tmp_path) == [NAME]  # it is not the refused one's to remove
    process.communicate("")
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_dead_owner_leaves_the_folder_free(owner, tmp_path):
    process = owner(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [NAME]
    with locked(tmp_path), pytest.raises(em.CheckpointInUse), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


FORKING = """
import os, pathlib, signal, sys, warnings
from eqxmeta._files.lock import locked
warnings.simplefilter("ignore")  # JAX has threads
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
reader, writer = os.pipe()
with locked(folder):
    child = os.fork()
    if child and how == "unwinds":
        os.waitpid(child, 0)
        print(os.listdir(folder), flush=True)
    elif child:
        os.read(reader, 1)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "outlives":
        os.write(writer, b"1")
        signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unwinds", "outlives"])
def test_a_fork_of_the_owner_is_no_owner(tmp_path, how):
    command = [sys.executable, "-c", FORKING, str(tmp_path), how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        try:
            process.wait(60)
            if how == "unwinds":
                assert line == f"{[NAME]}\n"
            else:
                with locked(tmp_path):
                    assert os.listdir(tmp_path) == [NAME]
        finally:
            if how == "outlives":
                os.kill(int(line), signal.SIGKILL)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("next_one", [True, False])
def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch, next_one):
    # Between the opening and the locking of the file its owner ended, and another one began or not.
    begin, others = fcntl.flock, []

    def late(file, how):
        if not others:
            (tmp_path / NAME).unlink()
            path = tmp_path / NAME if next_one else tmp_path.parent
            others.append(os.open(path, os.O_CREAT * next_one))
            begin(others[0], how)
        begin(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(em.CheckpointInUse), locked(tmp_path):
        raise AssertionError("two owners")
    os.close(others[0])
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_of_many_who_try_at_the_same_time_one_is_the_owner(tmp_path):
    # Threads, for the lock is of an open file and does not ask whose it is.
    def contend(_):
        owned = 0
        while owned < 100:
            with suppress(em.CheckpointInUse), locked(tmp_path):
                (tmp_path / "owner").mkdir()  # fails if there is one
                owned += 1
                (tmp_path / "owner").rmdir()
        return owned

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(contend, range(4))) == [100] * 4
    assert os.listdir(tmp_path) == []


def test_folders_that_were_made_for_nothing_go(tmp_path):
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "b" / "c"):
        pass
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.warns(RuntimeWarning, match="knows no locks"), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_into_the_folder_of_another_process_touches_nothing(owner, tmp_path):
    def callbacks():
        return [JSONL(tmp_path / "log"), Checkpoint(tmp_path / "saved", every=10)]

    boring_fit(20, callbacks=callbacks())
    owner(tmp_path / "saved")
    before, recorder = contents(tmp_path), Recorder()
    for resume in (None, "auto"):
        with pytest.raises(em.CheckpointInUse):
            boring_fit(30, callbacks=[*callbacks(), recorder], resume=resume)
        assert recorder.events == []
        assert contents(tmp_path) == before


RUN = """
import sys
from pathlib import Path
from eqxmeta.callbacks import JSONL, Callback, Checkpoint
from tests.boring import boring_fit

class Waiting(Callback):
    def on_chunk_end(self, run, metrics):
        if run.step == 10:
            print("training", flush=True)
            sys.stdin.readline()

folder = Path(sys.argv[1])
callbacks = [JSONL(folder / "log"), Waiting(), Checkpoint(folder / "saved", every=10)]
boring_fit(30, callbacks=callbacks, resume="auto", steps_per_execution=10)
"""


def run(folder):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_of_two_runs_into_one_folder_the_second_is_refused(tmp_path):
    saved = tmp_path / "saved"
    owner = run(tmp_path)
    try:
        assert owner.stdout.readline() == "training\n", owner.communicate("")[1]
        second = run(tmp_path)
        _, error = second.communicate("", timeout=300)
        assert second.returncode == 1
        received = rf"(?s)CheckpointInUse: .*{re.escape(str(tmp_path))}.*process {owner.pid} "
        assert re.search(received, error), error
        # The first goes on as if nothing had been.
        _, error = owner.communicate("go on\n", timeout=300)
        assert owner.returncode == 0, error
        assert sorted(os.listdir(saved)) == [f"step-0000000{step}.ckpt" for step in (10, 20, 30)]
        assert len((tmp_path / "log").read_text().splitlines()) == 30
    finally:
        owner.kill()


@pytest.mark.slow
def test_after_kill_9_of_the_owner_a_new_run_starts(tmp_path):
    owner = run(tmp_path)
    try:
        assert owner.stdout.readline() == "training\n", owner.communicate("")[1]
    finally:
        owner.kill()
    owner.communicate()
    assert (tmp_path / "saved" / NAME).exists()  # of a dead owner
    state = boring_fit(30, callbacks=[Checkpoint(tmp_path / "saved", every=10)], resume="auto")
    assert same_bits(state, boring_fit(30))
    assert not (tmp_path / "saved" / NAME).exists()


def test_two_checkpoints_of_one_run_need_two_folders(tmp_path):
    callbacks = [Checkpoint(tmp_path, every=10), Checkpoint(tmp_path, every=15, name="other")]
    with pytest.raises(em.CheckpointInUse, match=f"process {os.getpid()} "):
        boring_fit(20, callbacks=callbacks)
    assert os.listdir(tmp_path) == []


def fails(run):
    raise ZeroDivisionError


def stops(run):
    run.request_stop("enough")


@pytest.mark.parametrize("act", [None, stops, fails])
def test_the_lock_is_held_during_a_run_and_gone_after_it(tmp_path, act):
    seen = []

    def look(hook, step, run):
        seen.append((hook, (tmp_path / NAME).exists()))
        if act is not None and hook == "on_chunk_end":
            act(run)

    callbacks = [Recorder(act=look), Checkpoint(tmp_path, every=10)]
    if act is fails:
        with pytest.raises(ZeroDivisionError):
            boring_fit(30, callbacks=callbacks)
    else:
        boring_fit(30, callbacks=callbacks)
    assert all(held for _, held in seen) and len(seen) >= 3
    assert not (tmp_path / NAME).exists()


def test_a_run_that_never_starts_leaves_no_folder(tmp_path):
    with pytest.raises(em.CheckpointNotFound):
        boring_fit(
            30,
            callbacks=[Checkpoint(tmp_path / "a" / "b", every=10)],
            resume=tmp_path / "nothing",
        )
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").touch()
    recorder = Recorder(act=at("on_fit_start", 0, fails))
    with pytest.raises(OSError, match="file"):
        boring_fit(5, callbacks=[recorder, Checkpoint(tmp_path / "file" / "saved", every=10)])
    assert recorder.events == []


def test_a_lock_that_cannot_be_had_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="too long"), locked(tmp_path / "a" / "b", "c" * 300):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [lambda f: JSONL(f / "log.jsonl"), lambda f: TensorBoard(f)])
def test_a_log_has_one_writer(tmp_path, make):
    class Second(Callback):  # starts before the first run has written anything
        def on_fit_start(self, run):
            with pytest.raises(em.CheckpointInUse):
                boring_fit(3, callbacks=[make(tmp_path)])

    boring_fit(3, callbacks=[Checkpoint(tmp_path, every=3), make(tmp_path), Second()])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_lock_is_left_alone(tmp_path, link):
    notes = tmp_path / "notes"
    notes.write_text("somebody's")
    (tmp_path / NAME).symlink_to(notes) if link else (tmp_path / NAME).mkdir()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / NAME))):
        boring_fit(4, callbacks=[Checkpoint(tmp_path, every=2)])
    assert notes.read_text() == "somebody's"
    assert sorted(os.listdir(tmp_path)) == [NAME, "notes"]


def test_a_log_is_one_file_by_whatever_link_it_is_reached(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("log.jsonl")
    logs = [JSONL(tmp_path / "log.jsonl"), JSONL(tmp_path / "link.jsonl", name="second")]
    with pytest.raises(em.CheckpointInUse):
        boring_fit(4, callbacks=logs)
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl"]


def test_a_picture_does_not_take_the_place_of_a_log(tmp_path):
    picture = AdaptationPlot(em.tasks.Sinusoid(5, 5), tmp_path / "log.jsonl")
    with pytest.raises(em.CheckpointInUse):
        boring_fit(4, callbacks=[JSONL(tmp_path / "log.jsonl"), picture])
    assert os.listdir(tmp_path) == []
