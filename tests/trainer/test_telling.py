"""Telling the user does not cost the run: whoever listened may have gone."""

import contextlib
import io
import os
import sys
import warnings

import pytest

import eqxmeta as em
from eqxmeta._errors import tell
from eqxmeta.callbacks import Checkpoint, EarlyStopping, Lambda, ProgressBar

from ..boring import BoringModel, BoringStrategy, BoringTasks, boring_fit, same_bits


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed():
    file = io.StringIO()
    file.close()
    return file


def full():
    # What cannot be flushed stays in the buffer, and fails again each time.
    return open("/dev/full", "w")


def ascii_only():
    return io.TextIOWrapper(io.BytesIO(), "ascii")


GONE = [broken_pipe, closed, full, ascii_only, lambda: None]


@pytest.fixture(params=GONE, ids=["pipe", "closed", "full", "letters", "none"])
def gone(request, monkeypatch):
    """stdout and stderr, to which nothing can be said."""
    if request.param is full and not os.path.exists("/dev/full"):
        pytest.skip("no such device")
    streams = request.param(), request.param()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    yield
    monkeypatch.undo()
    for stream in filter(None, streams):
        with contextlib.suppress(OSError):
            stream.close()


def stopping(step, reason="größer wird es nicht"):
    def stop(run):
        run.request_stop(reason)

    return Lambda(every=step, on_step_end=stop)


@pytest.mark.usefixtures("gone")
def test_a_run_that_nobody_listens_to_returns_its_state(tmp_path):
    callbacks = [ProgressBar(disable=False), stopping(4), Checkpoint(tmp_path, every=2)]
    state = boring_fit(9, callbacks=callbacks, summary=True)
    assert same_bits(state, boring_fit(4))
    assert same_bits(em.load(callbacks[-1].last_path, state), state)


@pytest.mark.usefixtures("gone")
def test_warnings_that_nobody_hears():
    # pytest records warnings: here they go where Python sends them.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _python_shows
        strategy = BoringStrategy(nan_loss=3)
        state = boring_fit(5, strategy=strategy, on_non_finite="skip")
    assert int(state.step) == 5


def _python_shows(message, category, filename, lineno, file=None, line=None):
    sys.stderr.write(f"{message}")  # raises as `warnings.showwarning` does of a closed file


def test_a_filter_that_makes_errors_of_warnings_does_not_end_a_run(capsys):
    # Twice at a step at which nobody but the user's callback knows what is logged, and at the end.
    stop = EarlyStopping(monitor="other", mode="min", patience=2)
    callbacks = [Lambda(every=1, on_step_end=lambda run: None), stop]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = BoringStrategy(nan_loss=3)
        state = boring_fit(5, strategy=strategy, callbacks=callbacks, on_non_finite="skip")
    assert int(state.step) == 5
    told = capsys.readouterr().err
    assert "RuntimeWarning: The run skipped 1 steps" in told and "'other'" in told


def test_before_a_run_such_a_filter_is_obeyed(tmp_path):
    path = tmp_path / "x.ckpt"
    boring_fit(2, callbacks=[Checkpoint(tmp_path, every=1), stopping(5)])
    path = max(tmp_path.glob("*.ckpt"))
    path.write_bytes(path.read_bytes()[:-5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="damaged"):
            boring_fit(3, callbacks=[Checkpoint(tmp_path, every=1)], resume="auto")


@pytest.mark.usefixtures("gone")
def test_seeds_and_a_look_at_a_file_return_what_they_found(tmp_path):
    strategy = BoringStrategy(nan_loss=2)
    trainer = em.Trainer(strategy, meta_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = em.fit_seeds(trainer, BoringModel(), BoringTasks(), steps=3, seeds=2)
    assert not runs.finite.any()
    em.save(tmp_path / "größe.ckpt", BoringModel(), meta={"größe": 1})
    assert em.inspect(tmp_path / "größe.ckpt")["meta"] == {"größe": 1}


def test_what_is_told_reaches_whoever_listens(capsys, monkeypatch):
    tell("größe")
    tell("to stderr", sys.stderr)
    assert capsys.readouterr() == ("größe\n", "to stderr\n")
    stream = ascii_only()
    tell("größe", stream)
    assert stream.buffer.getvalue() == b"gr\\xf6\\xdfe\n"


def test_an_interrupt_is_not_swallowed():
    class Interrupted(io.StringIO):
        def write(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell("x", Interrupted())
