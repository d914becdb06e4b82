import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import types
import typing

import numpy as np
import pytest
from tqdm import tqdm

from eqxmeta._callback.published import Curve, Image
from eqxmeta.callbacks import ProgressBar

from ..fake_run import chunk, fake_run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use(monkeypatch, stderr):
    # Not in a fixture: pytest puts its own back between the set-up of a test and the test.
    monkeypatch.setattr("sys.stderr", stderr)
    return stderr


def last_frame(terminal):
    return terminal.getvalue().rstrip("\n").split("\r")[-1]


def finish(callback, run, last=40):
    for step in range(run.start + 10, last + 1, 10):
        chunk(run, callback, step - 9, step)


def test_shows_progress_speed_loss_and_published_values(monkeypatch):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback, steps=40)
    callback.on_fit_start(run)
    finish(callback, run)
    run.log(
        {
            "eval/loss": Curve(np.array([9.0, 0.375]), np.zeros(2)),
            "x": Image(np.zeros((1, 1, 3), np.uint8)),
        }
    )
    callback.on_fit_end(run)
    frame = last_frame(stderr)
    assert "100%" in frame and "40/40" in frame and "loss 0.025, eval/loss 0.375" in frame
    assert re.search(r"00:00 left, \S+ steps/s, \S+ tasks/s", frame)


def test_resumed_run_starts_where_it_starts(monkeypatch):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback, start=20, steps=40)
    callback.on_fit_start(run)
    assert "20/40" in last_frame(stderr)
    finish(callback, run, last=30)
    callback.on_fit_end(run)
    assert "75%" in last_frame(stderr) and "30/40" in last_frame(stderr)


def test_what_takes_long_is_shown_with_its_clock(monkeypatch):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback, steps=40)
    callback.on_fit_start(run)
    run.show("compiling 0:12")
    assert "compiling 0:12" in last_frame(stderr)
    run.show(None)
    assert "compiling" not in last_frame(stderr)
    finish(callback, run)
    run.show("Evaluate 0:02")
    callback.on_fit_end(run)
    assert "loss 0.025" in last_frame(stderr) and "Evaluate" not in last_frame(stderr)
    drawn = stderr.getvalue()
    run.show("Evaluate 0:03")  # late
    assert stderr.getvalue() == drawn


def test_without_a_bar_nothing_is_shown(monkeypatch):
    use(monkeypatch, io.StringIO())
    callback = ProgressBar()
    run = fake_run(callback, steps=40)
    callback.on_fit_start(run)
    assert run.show is None


def test_speed_comes_from_the_clock(monkeypatch):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback, steps=80)
    clock = iter([100.0, 102.0, 104.0])  # 10 steps in 2 s, 25 tasks a step
    callback.on_fit_start(run)
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(clock))
        finish(callback, run, last=30)
    callback.on_fit_end(run)
    assert "00:10 left, 5.00 steps/s, 125 tasks/s" in last_frame(stderr)


@pytest.mark.parametrize("hook", ["on_fit_end", "on_exception"])
def test_leaves_the_cursor_on_a_line_of_its_own(monkeypatch, hook):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback)
    callback.on_fit_start(run)
    finish(callback, run, last=20)
    assert not stderr.getvalue().endswith("\n")
    getattr(callback, hook)(run, *([KeyError()] if hook == "on_exception" else []))
    assert stderr.getvalue().endswith("\n")
    written = stderr.getvalue()
    run.log({"late": 1.0})
    callback.on_fit_end(run)
    assert stderr.getvalue() == written
    assert not tqdm._instances


@pytest.mark.parametrize("terminal, disable", [(False, None), (True, True)])
def test_quiet(monkeypatch, terminal, disable):
    stderr = use(monkeypatch, Terminal() if terminal else io.StringIO())
    callback = ProgressBar(disable=disable)
    run = fake_run(callback)
    callback.on_fit_start(run)
    finish(callback, run)
    run.log({"x": 1.0})
    callback.on_fit_end(run)
    assert stderr.getvalue() == ""


class Gone(Terminal):
    """A terminal that was closed, a pipe whose reader has ended, an alphabet that lacks letters."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        raise self.error


GONE = {
    "none": None,
    "pipe": Gone(BrokenPipeError(32, "Broken pipe")),
    "closed": Gone(ValueError("I/O operation on closed file.")),
    "disk": Gone(OSError(28, "No space left on device")),
    "letters": io.TextIOWrapper(io.BytesIO(), "ascii"),
    "object": object(),
}


@pytest.mark.parametrize("disable", [None, False])
@pytest.mark.parametrize("gone", GONE)
def test_nobody_there_to_be_told(monkeypatch, gone, disable):
    use(monkeypatch, GONE[gone])
    callback = ProgressBar(disable=disable)
    run = fake_run(callback)
    callback.on_fit_start(run)
    finish(callback, run)
    run.log({"eval/größe": 1.0})
    callback.on_fit_end(run)
    assert not tqdm._instances


@pytest.mark.parametrize(("columns", "rows"), [(0, 0), (0, 24), (80, 0)])
def test_a_pseudo_terminal_without_a_size(monkeypatch, columns, rows):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        use(monkeypatch, terminal)
        callback = ProgressBar()
        run = fake_run(callback)
        callback.on_fit_start(run)
        finish(callback, run)
        callback.on_fit_end(run)
        told = b""
        while b"100%" not in told:  # what one read returns may be a part
            told += os.read(ours, 10_000)
        shown = told.decode().rstrip().split("\r")[-1]
    os.close(ours)
    assert "100%|" in shown and "40/40" in shown and "loss 0.025" in shown and len(shown) < 80


def test_a_line_of_the_users_goes_above_the_bar(monkeypatch):
    stderr = use(monkeypatch, Terminal())
    callback = ProgressBar()
    run = fake_run(callback)
    callback.on_fit_start(run)
    tqdm.write("a line", file=stderr)
    callback.on_fit_end(run)
    assert re.search(r"\r +\ra line\n", stderr.getvalue())


def lines_of(callback, run, seconds, monkeypatch, last=40):
    """What is said of chunks of 10 steps that take so many seconds."""
    stderr = use(monkeypatch, io.StringIO())
    now = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: now[0])
        callback.on_fit_start(run)
        for step in range(10, last + 1, 10):
            now[0] += seconds
            chunk(run, callback, step - 9, step)
        callback.on_fit_end(run)
    return stderr.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    lines = lines_of(ProgressBar(log_every_seconds=60), fake_run(), 35.0, monkeypatch)
    assert lines == [
        " 50% 20/40 [01:10, 01:10 left, 0.29 steps/s, 7.14 tasks/s, loss 0.05]",
        *["100% 40/40 [02:20, 00:00 left, 0.29 steps/s, 7.14 tasks/s, loss 0.025]"] * 2,
    ]
    for quiet in (ProgressBar(log_every_seconds=None), ProgressBar(disable=True)):
        assert not lines_of(quiet, fake_run(), 35.0, monkeypatch)
    with pytest.raises(ValueError, match="log_every_seconds"):
        ProgressBar(log_every_seconds=0)


def test_the_time_that_is_left_counts_evaluations_in(monkeypatch):
    """Chunks of 10 steps take a second, and every 400th step 60 seconds more: of 4000 steps the
    rest of 2000 takes 500 s, though the last 20 chunks may have no evaluation among them."""
    stderr, now = use(monkeypatch, Terminal()), [0.0]
    callback, run = ProgressBar(), fake_run(steps=4000)
    run.cadence = 400
    monkeypatch.setattr("eqxmeta.callbacks._progress_bar.time.perf_counter", lambda: now[0])
    callback.on_fit_start(run)
    for step in range(10, 2391, 10):
        now[0] += 1 + 60 * (step > 10 and (step - 10) % 400 == 0)
        chunk(run, callback, step - 9, step)
    callback.on_log(run, {})
    left = 1610 * (40 + 60) / 400  # 402 seconds; without the evaluations 161
    minutes, seconds = re.search(r"(\d+):(\d+) left, 10.0 steps/s", last_frame(stderr)).groups()
    assert abs(60 * int(minutes) + int(seconds) - left) < 20
    callback.on_fit_end(run)


def test_in_a_notebook_there_is_a_bar_by_itself(monkeypatch):
    class Shell:
        config: typing.ClassVar = {"IPKernelApp": {}}

    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=Shell))
    stderr = use(monkeypatch, io.StringIO())
    callback, run = ProgressBar(), fake_run()
    callback.on_fit_start(run)
    finish(callback, run)
    callback.on_fit_end(run)
    assert "40/40" in last_frame(stderr)  # as text: there is no ipywidgets here
