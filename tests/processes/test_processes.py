"""Two processes that train together, over loopback. Few pairs are started: starting takes longer
than what they do."""

import json
import os
import signal
import time

import numpy as np
import pytest

from eqxmeta._checkpoint.save_load import read_manifest

from ..same_run import logged_steps
from .pair import finish, said, start, wait_for


def both(folder, scenario, codes=(0, 0)):
    """What each of the two has told."""
    assert finish(start(scenario, folder)) == list(codes), (folder / "err-0").read_text()
    return said(folder, 0), said(folder, 1)


def saved_steps(folder):
    return sorted(read_manifest(p)["meta"]["step"] for p in (folder / "saved").glob("*.ckpt"))


def rows(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_run_with_everything_attached_and_its_ends(tmp_path):
    zero, one = both(tmp_path, "one_run")
    assert zero["bits"] == one["bits"]
    # Measured together, and told to both; the same again outside of the run.
    assert zero["evaluated"] == one["evaluated"] == zero["again"] == one["again"]
    assert np.shape(zero["evaluated"]) == (7, 2)
    # One set of files, one terminal.
    assert sorted(os.listdir(tmp_path)) == [
        "board", "err-0", "err-1", "log.jsonl", "out-0", "out-1", "saved",
    ]  # fmt: skip
    assert rows(tmp_path) == list(range(1, 11)) and saved_steps(tmp_path) == [5, 10]
    assert logged_steps(tmp_path / "board") == list(range(1, 11))
    told = [(tmp_path / f"out-{i}").read_text() for i in (0, 1)]
    assert "which share the tasks" in told[0] and "strategy " not in told[1]
    assert "10/10" in (tmp_path / "err-0").read_text()
    assert "10/10" not in (tmp_path / "err-1").read_text()
    # What one does, both end by: a refused folder, a request, an error of the user's own.
    for name, kind in (("refused", "FileExistsError"), ("callback", "LookupError")):
        assert [zero[name][0], one[name][0]] == [kind, kind]
    assert "already holds a run" in one["refused"][1] and "process 0 of 2" in one["refused"][1]
    assert "of process 1" in zero["callback"][1] and "process 1 of 2" in zero["callback"][1]
    assert zero["stopped"][1] == one["stopped"][1] == 2
    assert one["stopped"][0] == "enough" and zero["stopped"][0] == "as another process asked"


@pytest.mark.slow
def test_what_else_one_decides_both_do(tmp_path):
    zero, one = both(tmp_path, "more")
    assert zero["late"] == one["late"] and zero["late"][0] == "time limit"
    assert zero["raise"][0] == one["raise"][0] == "NonFiniteError"
    assert zero["stop"] == one["stop"] == ["The metric 'loss' is not finite at step 3", 2]
    assert zero["skip"] == one["skip"]
    assert "every: {'Evaluate': 4}, and {'Evaluate': 3} in process 0" in zero["unequal"][1]
    assert zero["unequal"][0] == one["unequal"][0] == "ValueError"
    assert zero["source"][0] == one["source"][0] == "LookupError"
    assert "tasks[6]" in zero["source"][1]
    assert zero["host"] == one["host"]
    assert "jax.local_devices()" in zero["seeds"][1]
    assert "leaves other processes out" in zero["devices"][1]
    assert "devices of this process" in one["devices"][1]
    assert "a multiple of 2" in zero["divide"][1]
    # Process 1 sees no file of the run that it resumes.
    assert zero["files"] and not one["files"]
    assert zero["resumed"] == one["resumed"] == zero["straight"] == one["straight"]


def end_by(folder, number, to):
    """A run until both have taken a few steps, and a signal: the exit codes."""
    started = start("long", folder)
    try:
        wait_for(folder, "running 2", started)
        for index in to:
            started[index].send_signal(number)
        return finish(started)
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_ended_by_signals_and_resumed_by_one_process_more_or_fewer(tmp_path):
    assert end_by(tmp_path, signal.SIGTERM, [1]) == [0, 143]
    zero = said(tmp_path, 0)["ended"]
    assert zero[0] == "terminated" and saved_steps(tmp_path)[-1] == rows(tmp_path)[-1] == zero[1]
    assert end_by(tmp_path, signal.SIGINT, [0, 1]) == [0, 0]
    ends = [said(tmp_path, i)["ended"] for i in (0, 1)]
    assert ends[0] == ends[1] and ends[0][0] == "interrupted"
    assert saved_steps(tmp_path)[-1] == rows(tmp_path)[-1] == ends[0][1] >= zero[1]
    # Alone, and together again.
    for count, told in ((1, "devices 2, now 1"), (2, "devices 1, now 2")):
        (tmp_path / "steps").write_text(str(rows(tmp_path)[-1] + 10))
        assert finish(start("short", tmp_path, count)) == [0] * count
        assert told in (tmp_path / "err-0").read_text()
    assert rows(tmp_path) == list(range(1, int((tmp_path / "steps").read_text()) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_one_ends_the_other_and_the_pair_resumes(tmp_path, killed):
    began = time.monotonic()
    codes = end_by(tmp_path, signal.SIGKILL, [killed])
    assert time.monotonic() - began < 120
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None)
    told = (tmp_path / f"err-{1 - killed}").read_text()
    assert "What several processes compute together has failed." in told
    assert "start them all again, with `resume='auto'`" in told.replace("\n", " ")
    (tmp_path / "steps").write_text(str(rows(tmp_path)[-1] + 10))
    assert finish(start("short", tmp_path)) == [0, 0], (tmp_path / "err-0").read_text()
    ends = [said(tmp_path, i)["ended"] for i in (0, 1)]
    assert ends[0] == ends[1]
    assert rows(tmp_path) == list(range(1, ends[0][1] + 1))
