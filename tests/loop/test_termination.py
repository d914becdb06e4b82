"""SIGTERM, the word of schedulers: the run is saved whole, then the process ends with 143."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringStrategy, Recorder, at, boring_fit, same_bits

ROOT = Path(__file__).parents[2]


def terminate(run=None):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def sigterm(monkeypatch):
    # Else the end of this very process, if it is soon, would be watched.
    monkeypatch.setattr("eqxmeta._loop.signals.leave", lambda code: None)
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("hook", ["on_chunk_end", "on_step_end", "on_fit_end"])
def test_everything_is_saved_before_the_process_ends(hook, tmp_path, sigterm, capsys):
    recorder = Recorder(every=10, act=at(hook, 20, terminate))
    callbacks = [recorder, Checkpoint(tmp_path, every=1000)]
    with pytest.raises(SystemExit) as caught:
        boring_fit(40, callbacks=callbacks, steps_per_execution=5, summary=True)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    (end,) = recorder.steps_of("on_fit_end")
    assert end == {"on_fit_end": 40}.get(hook, 20)
    assert recorder.errors == []
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{end:09}.ckpt"]
    straight = boring_fit(end)
    assert same_bits(em.load(next(tmp_path.iterdir()), straight), straight)
    assert f"stopped at step {end} of 40: terminated" in capsys.readouterr().out


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, sigterm):
    recorder = Recorder(every=10, act=at("on_fit_start", 0, terminate))
    with pytest.raises(SystemExit) as caught:
        boring_fit(40, callbacks=[recorder, Checkpoint(tmp_path, every=10)])
    assert caught.value.code == 143
    assert [hook for _, hook, _ in recorder.events] == ["on_fit_start", "on_exception"]
    assert list(tmp_path.iterdir()) == []


def test_those_who_say_it_twice_are_no_worse_off(tmp_path, sigterm):
    def twice(run):
        terminate()
        terminate()

    recorder = Recorder(every=10, act=at("on_step_end", 20, twice))
    with pytest.raises(SystemExit):
        boring_fit(40, callbacks=[recorder, Checkpoint(tmp_path, every=1000)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000020.ckpt"]


def test_a_handler_of_the_users_is_called_after_the_state_is_saved(tmp_path, sigterm):
    seen = []
    handler = lambda number, frame: seen.append((number, os.listdir(tmp_path)))  # noqa: E731
    signal.signal(signal.SIGTERM, handler)
    recorder = Recorder(every=10, act=at("on_step_end", 20, terminate))
    state = boring_fit(40, callbacks=[recorder, Checkpoint(tmp_path, every=1000)])
    assert seen == [(signal.SIGTERM, ["step-000000020.ckpt"])]
    assert int(state.step) == 20
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_error_on_the_way_neither_hides_it_nor_is_hidden(sigterm, capsys):
    def fail(run):
        terminate()
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as caught:  # not for `except ValueError` of a sweep
        boring_fit(40, callbacks=[Recorder(every=10, act=at("on_step_end", 20, fail))])
    assert caught.value.code == 143
    assert type(caught.value.__cause__) is ZeroDivisionError
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_users_is_called_before_an_error_is_raised(sigterm):
    def fail(run):
        terminate()
        raise ZeroDivisionError

    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with pytest.raises(ZeroDivisionError):
        boring_fit(40, callbacks=[Recorder(every=10, act=at("on_step_end", 20, fail))])
    assert seen == [signal.SIGTERM]


def test_it_may_come_while_an_error_is_told(tmp_path, sigterm):
    seen = []  # the default would end this process
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(os.listdir(tmp_path)))
    callbacks = [
        Recorder(act=at("on_exception", 0, terminate)),
        Checkpoint(tmp_path, every=1000),
    ]
    with pytest.raises(em.NonFiniteError):
        boring_fit(40, strategy=BoringStrategy(nan_loss=13), callbacks=callbacks)
    assert "step-000000012.ckpt" in seen[0]  # called when the last good state was saved


def test_a_process_that_ignores_it_goes_on_ignoring_it(sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    recorder = Recorder(every=10, act=at("on_step_end", 10, terminate))
    assert int(boring_fit(40, callbacks=[recorder]).step) == 40


def test_the_trainer_tells_what_ended_the_run():
    from ..boring import BoringModel, BoringStrategy, BoringTasks

    stop = Recorder(every=10, act=at("on_step_end", 20, lambda run: run.request_stop("enough")))
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2, callbacks=[stop], summary=False)
    assert trainer.stop_reason is None
    trainer.fit(BoringModel(), BoringTasks(), 40)
    assert trainer.stop_reason == "enough"
    trainer.fit(BoringModel(), BoringTasks(), 5)
    assert trainer.stop_reason is None


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGTERM")
@pytest.mark.slow
def test_a_real_one_from_outside(tmp_path):
    command = [sys.executable, "-m", "tests.interrupt_run", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not process.stdout.readline().startswith("running"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err.startswith("SIGTERM: the run ends after what is under way") and err.count("\n") == 1
    assert "terminated" in out and "returned" not in out
    (path,) = tmp_path.iterdir()
    assert em.load(path, boring_fit(1)).step == int(path.name[5:-5])
