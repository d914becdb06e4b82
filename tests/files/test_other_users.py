"""What another user left in a shared folder, and what modes files have afterwards."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

import eqxmeta as em
from eqxmeta._files.atomic import replacing
from eqxmeta._files.lock import locked
from eqxmeta.callbacks import JSONL, Checkpoint

from ..boring import BoringModel, boring_fit

NOBODY = 65534


def as_nobody(function) -> str:
    """What became of `function` in a process of another user: "" or its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            function()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def shared():
    """A folder for everybody; pytest's own are root's alone."""
    if os.getuid() != 0:
        pytest.skip("needs another user to be")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def use(folder):
    with locked(folder):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:")
@pytest.mark.parametrize("mode", [0o644, 0o444, 0o604])
def test_a_dead_lock_of_another_user_is_no_obstacle(shared, mode):
    lock = shared / ".lock"
    lock.write_text("process 1 on a machine that is gone\n")
    lock.chmod(mode)
    assert as_nobody(lambda: use(shared)) == ""
    assert not lock.exists()


@pytest.mark.filterwarnings("ignore:.*fork:")
def test_a_living_one_is(shared):
    with locked(shared):
        (shared / ".lock").chmod(0o644)
        told = as_nobody(lambda: use(shared))
    assert told.startswith("CheckpointInUse") and f"process {os.getpid()}" in told


@pytest.mark.filterwarnings("ignore:.*fork:")
def test_one_that_cannot_even_be_read_is_named(shared):
    lock = shared / ".lock"
    lock.touch(0o600)
    told = as_nobody(lambda: use(shared))
    assert told.startswith("PermissionError") and f"Received: {lock}: " in told
    assert told.endswith("remove it")


@pytest.mark.filterwarnings("ignore:.*fork:")
def test_a_folder_that_lets_nobody_in_is_not_told_as_a_lock(shared):
    shared.chmod(0o755)
    told = as_nobody(lambda: use(shared))
    assert told.startswith("PermissionError") and "remove it" not in told


@pytest.mark.filterwarnings("ignore:(?s).*is damaged:RuntimeWarning")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_modes_are_kept(tmp_path, mode):
    log = tmp_path / "log.jsonl"

    def fit(steps):
        callbacks = [JSONL(log), Checkpoint(tmp_path / "saved", every=5)]
        boring_fit(steps, callbacks=callbacks, resume="auto")

    fit(5)
    log.chmod(mode)
    log.write_bytes(b"{\n" + log.read_bytes() + b'{"step": 6}\n')  # to be written anew, and copied
    fit(10)
    em.save(tmp_path / "x", BoringModel())
    (tmp_path / "x").chmod(mode)
    em.save(tmp_path / "x", BoringModel())
    for path in (log, tmp_path / "log.jsonl.stale", tmp_path / "x"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_file_that_takes_the_place_of_anothers_stays_his(shared):
    path = shared / "x"
    path.write_bytes(b"old")
    os.chown(path, NOBODY, NOBODY)
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
