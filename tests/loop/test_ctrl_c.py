"""Ctrl-C ends a run whole and saved, wherever it hits; the second one ends the process."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Lambda

from ..boring import BoringStrategy, Recorder, at, boring_fit, same_bits

ROOT = Path(__file__).parents[2]
HOOKS_OF_A_RUN = ("on_chunk_end", "on_step_end", "on_fit_end")


@pytest.fixture
def sigint():
    """Python's own handler is in place: not so if the tests were started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt(run=None):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("hook", HOOKS_OF_A_RUN)
def test_ctrl_c_ends_the_run_with_everything_saved(hook, tmp_path, sigint):
    recorder = Recorder(every=10, act=at(hook, 20, interrupt))
    callbacks = [recorder, Checkpoint(tmp_path, every=1000)]
    state = boring_fit(40, callbacks=callbacks, steps_per_execution=5)
    end = int(state.step)
    assert end == {"on_fit_end": 40}.get(hook, 20)
    assert recorder.steps_of("on_fit_end") == [end]
    assert recorder.errors == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (path,) = tmp_path.iterdir()
    assert path.name == f"step-{end:09}.ckpt"
    assert same_bits(em.load(path, state), state)
    assert recorder.metrics["step"].tolist() == list(range(1, end + 1))


@pytest.mark.parametrize("interactive", [False, True])
def test_before_the_first_step_there_is_nothing_to_end(interactive, tmp_path, sigint, monkeypatch):
    if interactive:  # at a prompt only the command ends
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    recorder = Recorder(every=10, act=at("on_fit_start", 0, interrupt))
    with pytest.raises(KeyboardInterrupt) as caught:
        boring_fit(40, callbacks=[recorder, Checkpoint(tmp_path, every=10)])
    assert isinstance(caught.value, SystemExit) is not interactive
    assert interactive or caught.value.code == 130
    assert [hook for _, hook, _ in recorder.events] == ["on_fit_start", "on_exception"]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_while_the_user_s_code_is_traced_it_ends_at_once(sigint):
    reached = []

    class Pressed(BoringStrategy):
        def init(self, model):
            interrupt()
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        boring_fit(40, strategy=Pressed())
    assert reached == []


def test_ctrl_c_while_the_device_works(tmp_path, sigint):
    # Not from a hook: at whatever line the main thread is, most likely waiting for the device.
    timer = threading.Timer(0.5, interrupt)
    recorder = Recorder(act=lambda hook, step, run: timer.start() if step == 0 else None)
    state = boring_fit(10**9, callbacks=[recorder, Checkpoint(tmp_path, every=10**9)])
    timer.join()
    end = int(state.step)
    assert recorder.stop_reason == "interrupted"
    assert recorder.metrics["index"].tolist() == list(range(end))
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{end:09}.ckpt"]
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.model))


@pytest.mark.parametrize("hook", HOOKS_OF_A_RUN[:2])
def test_keyboard_interrupt_raised_in_a_hook(hook, tmp_path):
    def interrupted(run):
        raise KeyboardInterrupt

    first = Recorder("first", every=10, act=at(hook, 20, interrupted))
    second = Recorder("second", every=10)
    callbacks = [first, second, Checkpoint(tmp_path, every=1000)]
    state = boring_fit(40, callbacks=callbacks, steps_per_execution=5)
    end = int(state.step)
    assert end == 20
    assert first.steps_of("on_fit_end") == second.steps_of("on_fit_end") == [end]
    assert first.errors == second.errors == []
    assert first.stop_reason == "interrupted"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("step", [10, 13])
def test_keyboard_interrupt_in_a_hook_takes_no_rows_from_the_others(step):
    def interrupted(run):
        raise KeyboardInterrupt

    first = Recorder("first", every=10, act=at("on_chunk_end", step, interrupted))
    second = Recorder("second")
    state = boring_fit(40, callbacks=[first, second], steps_per_execution=3)
    assert second.metrics["step"].tolist() == list(range(1, int(state.step) + 1))


def test_a_second_ctrl_c_raises(sigint):
    def twice(run):
        interrupt()
        interrupt()

    recorder = Recorder(every=10, act=at("on_step_end", 20, twice))
    with pytest.raises(KeyboardInterrupt):
        boring_fit(40, callbacks=[recorder])
    assert [type(error) for error in recorder.errors] == [KeyboardInterrupt]
    assert recorder.steps_of("on_fit_end") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("failing", [False, True])
def test_the_handler_of_ctrl_c_is_that_from_before(failing, sigint):
    def handler(number, frame):
        raise AssertionError("not while a run is on")

    signal.signal(signal.SIGINT, handler)
    if failing:
        with pytest.raises(em.NonFiniteError):
            boring_fit(10, strategy=BoringStrategy(nan_loss=3))
    else:
        boring_fit(10)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(sigint):
    # `nohup` and background jobs: the terminal's Ctrl-C is meant for somebody else.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder(every=10, act=at("on_step_end", 10, interrupt))
    assert int(boring_fit(40, callbacks=[recorder]).step) == 40


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.slow
def test_a_real_ctrl_c_from_outside(tmp_path, again):
    folder = tmp_path / "saved"
    command = [sys.executable, "-m", "tests.interrupt_run", str(folder), *["again"] * again]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []

    def wait_for(word):
        for line in process.stdout:
            lines.append(line)
            if line.startswith(word):
                return
        raise AssertionError(f"never said {word!r}: {lines[-5:]}, {process.stderr.read()}")

    try:
        wait_for("running")
        wait_for("running")
        process.send_signal(signal.SIGINT)
        if again:
            wait_for("ending")
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    out = "".join(lines) + out
    if again:
        assert process.returncode != 0
        assert "KeyboardInterrupt" in err
        assert "returned" not in out
        return
    assert process.returncode == 0, err
    assert err.startswith("Ctrl-C: the run ends after what is under way") and err.count("\n") == 1
    found = re.search(
        r"stopped at step ([\d,]+) of 1,000,000,000: interrupted\nreturned (\d+) True$",
        out.rstrip(),
    )
    assert found is not None, out[-500:]
    step = int(found[2])
    assert int(found[1].replace(",", "")) == step > 0
    assert [path.name for path in folder.iterdir()] == [f"step-{step:09}.ckpt"]
    assert em.load(next(folder.iterdir()), boring_fit(1)).step == step


def test_fit_from_another_thread():
    # Python allows signal handlers in the main thread only.
    states = []
    thread = threading.Thread(target=lambda: states.append(boring_fit(20)))
    thread.start()
    thread.join()
    assert same_bits(states[0], boring_fit(20))


def test_fit_inside_a_hook():
    inner = []
    recorder = Recorder(
        every=10, act=at("on_step_end", 10, lambda run: inner.append(boring_fit(7)))
    )
    state = boring_fit(20, callbacks=[recorder])
    assert int(inner[0].step) == 7
    assert same_bits(state, boring_fit(20))


def test_ctrl_c_in_a_run_within_a_run_ends_both(sigint):
    inner = []
    press = Recorder(every=4, act=at("on_step_end", 4, interrupt))

    def nested(run):
        inner.append(int(boring_fit(20, callbacks=[press]).step))

    state = boring_fit(40, callbacks=[Lambda(every=8, on_step_end=nested)])
    assert inner == [4]
    assert int(state.step) == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
