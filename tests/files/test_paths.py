"""What is on the disk when: of a machine that loses its power only what was synced is left."""

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eqxmeta as em
from eqxmeta._checkpoint import container as _container
from eqxmeta._checkpoint.save_load import verify
from eqxmeta._files import paths as _files
from eqxmeta._files.paths import make_folder, sync_folder
from eqxmeta.callbacks import JSONL, Checkpoint, TensorBoard

from ..boring import BoringModel, Recorder, boring_fit


@pytest.fixture
def synced(monkeypatch):
    """The entries of folders that are on the disk, in the order in which they came there."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    entries = []
    fsync = os.fsync

    def recorded(descriptor):
        fsync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            entries.extend(os.path.join(folder, name) for name in os.listdir(folder))

    monkeypatch.setattr(os, "fsync", recorded)
    return entries


def test_a_power_cut_leaves_no_checkpoint_without_its_folder_and_logs(tmp_path, synced):
    saved, logs, board = tmp_path / "a" / "saved", tmp_path / "b" / "logs", tmp_path / "c" / "board"
    callbacks = [Checkpoint(saved, every=5), JSONL(logs / "x.jsonl"), TensorBoard(board)]
    boring_fit(5, callbacks=callbacks)
    (events,) = board.iterdir()
    paths = [saved, logs, board, logs / "x.jsonl", events]
    paths += [path.parent for path in paths[:3]]
    first = synced.index(str(saved / "step-000000005.ckpt"))
    assert {str(path) for path in paths} <= set(synced[:first])


class Slow:
    """`os.fsync` that does not end before `open` is set; what is on the disk afterwards."""

    def __init__(self, monkeypatch, folder):
        self.open, self.threads, self.disk = threading.Event(), [], {}
        self._fsync, self._replace, self._folder = os.fsync, os.replace, folder
        self.named = []  # each checkpoint that got its name, with what the disk had then
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor):
        self.threads.append(threading.current_thread().name)
        assert self.open.wait(60)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            self.disk[path] = Path(path).read_bytes()
        self._fsync(descriptor)

    def replace(self, temporary, path):
        self.named.append((Path(path), dict(self.disk)))
        self._replace(temporary, path)


def steps_on_the_disk(disk, folder):
    """Those that the JSONL and TensorBoard would show after a power cut."""
    rows = [json.loads(x)["step"] for x in disk[str(folder / "x.jsonl")].splitlines()]
    after = folder.with_name("after")
    after.mkdir()
    for path in folder.glob("*tfevents*"):
        (after / path.name).write_bytes(disk[str(path)])
    events = EventAccumulator(str(after), size_guidance={"scalars": 0}).Reload()
    shutil.rmtree(after)
    return rows, [event.step for event in events.Scalars("train/loss")]


class Curves(Recorder):
    """Logs a curve, for which `TensorBoard` opens another file."""

    def on_step_end(self, run):
        super().on_step_end(run)
        run.log({"eval/loss": em.Curve(np.ones(2), np.zeros(2)), "value": float(run.step)})


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_training_does_not_wait_for_the_logs_and_they_are_on_the_disk_first(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    slow = Slow(monkeypatch, logs)
    slow.open.set()
    seen = []

    def act(hook, step, run):
        if hook == "on_fit_start":
            slow.threads.clear()
        elif hook == "on_chunk_end":
            # From here to step 38 no sync ends: whoever waits for one would wait for ever.
            slow.open.clear() if step < 38 else slow.open.set()
            seen.append((step, {*slow.threads}))

    last = Curves("last", every=10, act=act)
    last.last = True
    saved = Checkpoint(tmp_path / "saved", every=20, keep=None)
    callbacks = [JSONL(logs / "x.jsonl"), TensorBoard(logs, every=1), saved, last]
    boring_fit(40, callbacks=callbacks, steps_per_execution=2)
    before_the_end = [threads for step, threads in seen if step <= 38]
    assert len(seen) == 20 and before_the_end[-1] == {"eqxmeta-checkpoint"}
    assert [path.name for path, _ in slow.named] == [f"step-0000000{n}.ckpt" for n in (20, 40)]
    for path, disk in slow.named:
        rows, events = steps_on_the_disk(disk, logs)
        expected = list(range(1, int(path.name[5:-5]) + 1))
        assert rows[: len(expected)] == events[: len(expected)] == expected


def test_logs_that_cannot_be_synced_leave_no_checkpoint_behind(tmp_path, monkeypatch):
    def fails(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(JSONL, "sync_files", fails)
    with pytest.raises(OSError, match="Input/output") as error:
        boring_fit(20, callbacks=[JSONL(tmp_path / "log"), Checkpoint(tmp_path / "saved", every=5)])
    assert "step 5 was not written" in error.value.__notes__[0]
    assert os.listdir(tmp_path) == ["log"]


def test_a_folder_that_cannot_be_synced_is_not_left_behind(tmp_path, monkeypatch):
    def fails(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_files, "sync_folder", fails)
    with pytest.raises(OSError, match="Input/output"):
        make_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_a_sync_of_folders_are_no_obstacle(tmp_path, monkeypatch, code):
    def unknown(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", unknown)
    sync_folder(tmp_path)


def test_a_folder_that_may_not_be_read_is_no_obstacle(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)  # root, as who tests may run, is never refused
    sync_folder(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_a_file_is_verified_on_the_disk_rather_than_in_memory(tmp_path, monkeypatch, known):
    calls = []

    def advised(descriptor, *advice):
        calls.append((os.fstat(descriptor).st_ino, *advice))
        raise OSError(95, "Operation not supported")  # no reason not to read the file

    check = _container.Reader.check

    def checks(self, entry):
        calls.append(entry["path"])
        return check(self, entry)

    if not hasattr(os, "posix_fadvise"):
        pytest.skip("needs posix_fadvise")
    em.save(tmp_path / "x", BoringModel())
    if known:
        monkeypatch.setattr(os, "posix_fadvise", advised)
    else:
        monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(_container.Reader, "check", checks)
    verify(tmp_path / "x")
    advice = [((tmp_path / "x").stat().st_ino, 0, 0, os.POSIX_FADV_DONTNEED)]
    assert calls == advice * known + [".weight", ".bias"]
