"""One job at a time on a thread, and nobody goes on or ends before it has ended."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eqxmeta._files.background import Background
from eqxmeta._files.patience import hurry

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    time.sleep(0.05)
    assert threading.active_count() == before


@pytest.fixture
def background():
    return Background("test")


def test_jobs_follow_each_other(background):
    done = []
    for index in range(3):
        background.start(lambda index=index: (time.sleep(0.01), done.append(index)))
    background.wait()
    assert done == [0, 1, 2]


def test_an_interrupt_is_told_at_once_and_the_error_later(background):
    opened = threading.Event()

    def job():
        opened.wait(60)
        raise OSError("the disk")

    background.start(job)
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    assert background.busy
    ended = []
    background.when_done(lambda: ended.append(True))
    assert ended == []
    opened.set()
    with pytest.raises(OSError, match="the disk"):
        background.wait()
    assert ended == [True]
    assert not background.wait()  # once
    background.when_done(lambda: ended.append(True))
    assert len(ended) == 2


def test_an_interrupt_after_the_end_does_not_lose_the_error(background, monkeypatch):
    def job():
        raise OSError("the disk")

    def interrupted(thread):
        raise KeyboardInterrupt

    background.start(job)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.wait()
    with pytest.raises(OSError, match="the disk"):
        background.wait()
    assert not background.wait()


def test_a_process_that_is_to_end_gives_it_little_time(background, monkeypatch):
    monkeypatch.setattr("eqxmeta._files.background.SECONDS", 0.1)
    opened, done = threading.Event(), []
    background.start(lambda: (opened.wait(60), done.append(1)))
    threading.Timer(0.1, lambda: hurry(time.monotonic())).start()
    try:
        assert not background.wait()
        assert background.busy
        background.start(lambda: done.append(2))  # whatever becomes of the other
        assert background.wait() and done == [2]
    finally:
        hurry(math.inf)
        opened.set()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_does_not_wait_for_a_thread_that_it_does_not_have(background):
    opened, done = threading.Event(), []
    background.start(lambda: (opened.wait(60), done.append(1)))
    child = os.fork()
    if not child:
        signal.alarm(60)  # the end, if it waits
        waited = background.wait()
        background.start(lambda: done.append(2))
        os._exit(0 if not waited and background.wait() and done == [2] else 1)
    _, status = os.waitpid(child, 0)
    opened.set()
    assert background.wait() and done == [1]
    assert status == 0


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_does_not_start_is_not_waited_for(background, monkeypatch, error):
    def fails(thread):
        raise error

    done = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(type(error)):
            background.start(lambda: done.append(1))
    assert not background.busy
    background.wait()
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [2]


def test_a_job_that_was_called_off_does_not_run_later(background, monkeypatch):
    # The interrupt may come when the thread exists but has not run a line.
    done, late = [], []

    def interrupted(thread):
        late.append(thread)
        raise KeyboardInterrupt

    start = threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.start(lambda: done.append(1))
    start(late[0])
    late[0].join()
    background.wait()
    assert done == []


@pytest.mark.slow
def test_the_interpreter_does_not_wait_for_a_job_that_hangs():
    code = """
import sys, threading
from eqxmeta._files.background import Background
from eqxmeta._files.patience import hurry

Background("test").start(threading.Event().wait)
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 3
