"""The short forms of `python -m tests.faults`; the long ones try the same more often."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..boring import Recorder, at, boring_fit, same_bits
from .damage import damage
from .distributed import distributed
from .exchange import exchange
from .fuzz import fuzz
from .writes import writes

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_terminated_and_interrupted_runs_are_continued_exactly():
    # A process of its own: it forks, which JAX allows before its first use only.
    command = [sys.executable, "-m", "tests.faults", "kill", "--times", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried 5, survived 5, lost 0" in done.stdout


@pytest.mark.slow
def test_pairs_of_processes_are_continued_exactly(tmp_path):
    tally = distributed(tmp_path, 2, random.Random(3))
    assert not tally.lost, tally
    assert sum(tally.tried.values()) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_writes_that_fail_lose_nothing(tmp_path):
    tally = writes(tmp_path, stride=17)
    assert not tally.lost, tally
    assert sum(tally.tried.values()) > 15


@pytest.mark.parametrize(
    ("stride", "times"), [(25, 3), pytest.param(3, 20, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_moved_or_thinned_by_others_is_told_and_nobody_else_suffers(
    tmp_path, stride, times
):
    tally = exchange(tmp_path, random.Random(0), stride=stride, times=times)
    assert not tally.lost, tally
    assert sum(tally.tried.values()) > times


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_files_are_refused(tmp_path):
    tally = damage(tmp_path, 60, random.Random(0), every=10_000)
    assert not tally.lost, tally
    assert sum(tally.tried.values()) > 80


@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_becomes_of_files_is_found_out_or_does_no_harm(tmp_path, examples):
    tally = fuzz(tmp_path, random.Random(0), examples=examples)
    assert not tally.lost, tally
    assert sum(tally.tried.values()) > 2 * examples


def test_two_checkpoints_that_were_swapped_are_passed_over(tmp_path):
    boring_fit(30, callbacks=[Checkpoint(tmp_path, every=10)])
    paths = [tmp_path / f"step-0000000{step}.ckpt" for step in (20, 30)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    recorder = Recorder()
    with pytest.warns(RuntimeWarning) as warned:
        state = boring_fit(40, callbacks=[recorder, Checkpoint(tmp_path, every=10)], resume="auto")
    told = [str(w.message) for w in warned if "it is another one" in str(w.message)]
    assert sorted("saved as step-000000020" in text for text in told) == [False, True]
    assert recorder.events[0] == ("recorder", "on_fit_start", 10)
    assert same_bits(state, boring_fit(40))


def test_a_renamed_checkpoint_is_resumed_by_its_path(tmp_path):
    boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])
    path = (tmp_path / "step-000000010.ckpt").rename(tmp_path / "mine")
    with pytest.warns(RuntimeWarning, match="not attached"):
        assert same_bits(boring_fit(20, resume=path), boring_fit(20))


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_disk_that_is_full_from_some_step_on(tmp_path, policy):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(run):
        while not (tmp_path / "step-000000010.ckpt").exists():
            time.sleep(0.01)  # the thread is not yet done with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    def fit():
        recorder = Recorder(every=1, act=at("on_step_end", 11, limit))
        checkpoint = Checkpoint(tmp_path, every=10, on_error=policy)
        return boring_fit(30, callbacks=[recorder, checkpoint])

    try:
        if policy == "raise":
            with pytest.raises(OSError, match="too large"):
                fit()
        else:
            with pytest.warns(RuntimeWarning, match="(?s)was not written.*too large"):
                state = fit()
            assert same_bits(state, boring_fit(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["step-000000010.ckpt"]
    straight = boring_fit(10)
    assert same_bits(em.load(tmp_path / "step-000000010.ckpt", straight), straight)
