"""What is on the disk when: of a machine that loses its power only what was synced is left."""

import errno
import os
import stat

import pytest

import eqxmeta as em
from eqxmeta._checkpoint import container as _container
from eqxmeta._checkpoint.save_load import verify
from eqxmeta._files import paths as _files
from eqxmeta._files.paths import make_folder, sync_folder
from eqxmeta.callbacks import JSONL, Checkpoint, TensorBoard

from ..boring import BoringModel, boring_fit


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
