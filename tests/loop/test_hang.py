"""Something hangs: a source, a thread of a callback, a disk. Nothing that asks the run to end waits
for it, and what the run has reached is saved."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eqxmeta as em

from ..boring import boring_fit, host_batch
from ..hang_run import STEP
from ..helpers import tree_allclose

ROOT = Path(__file__).parents[2]

# A second or two, and what a machine that is busy with other tests takes.
SOON = 10


class Hanging:
    """The process of `tests.hang_run`, when it hangs."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "tests.hang_run", str(folder), *arguments]
        self.folder = folder
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line == "hangs\n":
                break
        else:
            raise AssertionError(self.process.stderr.read())
        time.sleep(0.3)

    def end(self, *numbers, pause=0.5):
        """Send the signals; the exit code, stdout and stderr, and how long it took."""
        try:
            begin = time.monotonic()
            for index, number in enumerate(numbers):
                time.sleep(pause if index else 0)
                self.process.send_signal(number)
            out, err = self.process.communicate(timeout=60)
            self.seconds = time.monotonic() - begin
        finally:
            self.process.kill()
            self.process.wait()
        assert self.seconds < SOON, err
        return self.process.returncode, "".join(self.lines) + out, err

    @property
    def saved(self):
        return sorted(int(path.name[5:-5]) for path in (self.folder / "saved").glob("step-*.ckpt"))


class Same:
    def __getitem__(self, step):
        return host_batch(step)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_source_that_hangs(tmp_path, number, code):
    hanging = Hanging(tmp_path, "source")
    returncode, out, err = hanging.end(number)
    assert returncode == code, err
    assert f"stopped at step {STEP} of" in out
    assert (f"returned {STEP}\n" in out) is (code == 0)
    assert "the run ends after what is under way" in err
    assert hanging.saved[-1] == STEP
    straight = boring_fit(STEP, tasks=Same())
    assert tree_allclose(em.load(tmp_path / "saved" / f"step-{STEP:09}.ckpt", straight), straight)


@pytest.mark.slow
def test_max_time_does_not_wait_for_a_source(tmp_path):
    hanging = Hanging(tmp_path, "source", "1")
    code, out, err = hanging.end()
    assert (code, err) == (0, "")
    assert f"stopped at step {STEP} of 1,000,000,000: time limit\nreturned {STEP}\n" in out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["first batch", "tracing"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step(tmp_path, what, number, code):
    hanging = Hanging(tmp_path, what)
    returncode, _out, err = hanging.end(number)
    assert returncode == code
    assert "It had taken no step, and nothing is lost." in err
    assert err.count("\n") == 1
    assert hanging.saved == []


@pytest.mark.slow
def test_a_library_that_lets_no_handler_run(tmp_path):
    # Where there is nothing to lose, the process ends without its main thread.
    code, _out, err = Hanging(tmp_path, "library").end(signal.SIGTERM)
    assert code == 143
    assert err == "SIGTERM: the run ends. It had taken no step, and nothing is lost.\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step end", "fit end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_hook_that_waits_for_a_thread_that_hangs(tmp_path, what, number):
    hanging = Hanging(tmp_path, what)
    numbers = [number]
    if number == signal.SIGINT:  # the second is for the interpreter, which joins the thread
        numbers, pause = [number, number], 5
    else:
        pause = 0
    code, _out, err = hanging.end(*numbers, pause=pause)
    assert code == (0 if number == signal.SIGINT else 143), err
    hook = what.replace(" ", "_")
    assert f"Hook.on_{hook} was left" in err
    assert hanging.saved == [STEP]


@pytest.mark.slow
def test_a_thread_that_is_no_daemon_does_not_keep_the_process(tmp_path):
    hanging = Hanging(tmp_path, "thread")
    code, out, err = hanging.end(signal.SIGTERM)
    assert code == 143, err
    (end,) = hanging.saved
    assert f"stopped at step {end:,} of" in out


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGINT] * 2, [signal.SIGTERM]])
def test_a_disk_that_takes_a_minute(tmp_path, numbers):
    hanging = Hanging(tmp_path, "disk")
    code, out, err = hanging.end(*numbers, pause=0.1)
    if len(numbers) == 2:
        assert code != 0 and "KeyboardInterrupt" in err
        return
    assert code == (143 if numbers == [signal.SIGTERM] else 0), err
    # It has its name, and outlives the process; whether the machine's end, is the disk's.
    end = hanging.saved[-1]
    assert f"stopped at step {end:,} of" in out
    assert "in its place, but not synced" in err
    straight = boring_fit(end)
    assert tree_allclose(em.load(tmp_path / "saved" / f"step-{end:09}.ckpt", straight), straight)
