import errno
import json
import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta._callback.published import Curve, Image
from eqxmeta.callbacks import JSONL, Checkpoint

from ..boring import Recorder, boring_fit
from ..fake_run import chunk, fake_run, loss


def rows(path):
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def steps_of(path):
    return [row["step"] for row in rows(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "run.jsonl"


CURVE = Curve(np.array([4.0, 1.0]), np.array([0.5, 0.25]))


def start(path, **kwargs):
    callback = JSONL(path, every=kwargs.pop("every", 1))
    run = fake_run(callback, **kwargs)
    if run.resuming:
        callback.load_state_dict({})  # from a checkpoint that it was part of
    callback.on_fit_start(run)
    return callback, run


def test_numbers_read_back_exactly(path):
    callback, run = start(path)
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    half = np.asarray(jnp.asarray(values, jnp.bfloat16))
    chunk(run, callback, 1, 7, value=values, half=half, count=np.arange(7))
    callback.on_fit_end(run)
    assert np.array_equal(np.array([row["value"] for row in rows(path)], np.float32), values)
    assert [row["half"] for row in rows(path)] == [float(x) for x in half]
    assert [row["count"] for row in rows(path)] == list(range(7))
    assert list(rows(path)[0]) == ["step", "loss", "value", "half", "count"]


def test_one_line_a_step_with_what_was_published_at_it(path):
    callback, run = start(path)
    chunk(run, callback, 1, 10)
    run.log({"eval/loss": CURVE, "figure": Image(np.zeros((1, 1, 3), np.uint8))})
    run.log({"rate": 0.5})
    assert steps_of(path) == list(range(1, 10))  # the newest is held back
    chunk(run, callback, 11, 11)
    callback.on_fit_end(run)
    assert steps_of(path) == list(range(1, 12))
    eval_loss = {"mean": [4.0, 1.0], "ci95": [0.5, 0.25]}
    assert rows(path)[9] == {
        "step": 10,
        "loss": float(loss(10)),
        "eval/loss": eval_loss,
        "rate": 0.5,
    }


def test_thinned_out_steps_keep_what_was_published(path):
    callback, run = start(path, every=4)
    assert callback.every is None
    chunk(run, callback, 1, 6)
    run.log({"rate": 0.5})
    chunk(run, callback, 7, 9)
    callback.on_fit_end(run)
    expected = [{"step": 4, "loss": 0.25}, {"step": 6, "rate": 0.5}, {"step": 8, "loss": 0.125}]
    assert rows(path) == expected


def test_images_alone_make_no_line(path):
    callback, run = start(path, every=4)
    run.step = 3
    run.log({"figure": Image(np.zeros((1, 1, 3), np.uint8))})
    callback.on_fit_end(run)
    assert rows(path) == []


def test_what_is_published_after_the_end_joins_its_line(path):
    callback, run = start(path)
    chunk(run, callback, 1, 2)
    callback.on_fit_end(run)
    run.log({"last": 1.0})
    assert rows(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "last": 1.0}]


def test_a_checkpoint_has_the_whole_row_and_a_later_value_does_not_double_it(path):
    callback, run = start(path)
    chunk(run, callback, 1, 2)
    run.log({"a": 1.0})
    callback.state_dict()
    assert rows(path)[-1] == {"step": 2, "loss": 0.5, "a": 1.0}
    run.log({"b": 2.0})
    callback.on_exception(run, RuntimeError())
    assert rows(path)[-1] == {"step": 2, "loss": 0.5, "a": 1.0, "b": 2.0}
    assert steps_of(path) == [1, 2]


def test_not_finite_values_are_valid_json(path):
    callback, run = start(path)
    chunk(run, callback, 1, 3, bad=np.array([np.nan, np.inf, -np.inf], np.float32))
    run.log({"curve": Curve(np.array([math.nan]), np.array([0.0]))})
    callback.on_fit_end(run)
    assert [row["bad"] for row in rows(path)] == ["NaN", "Infinity", "-Infinity"]
    assert rows(path)[-1]["curve"] == {"mean": ["NaN"], "ci95": [0.0]}
    assert float(rows(path)[2]["bad"]) == -math.inf


def train(callback, run, last, *, sizes, save=None):
    """Steps in chunks, an evaluation at multiples of 5, a checkpoint at step `save`."""
    step = run.start
    sizes = iter(sizes)
    while step < last:
        stop = min(step + next(sizes), last, (step // 5 + 1) * 5)
        chunk(run, callback, step + 1, stop)
        step = stop
        if step % 5 == 0:
            run.log({"eval/loss": CURVE})
        if step == save:
            callback.state_dict()


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("tear", [b"", b'{"step": 20, "lo', b"\xff\x00\n", b"{}\n3\n"])
@pytest.mark.filterwarnings("ignore:(?s).*is damaged:RuntimeWarning")
def test_resumed_run_leaves_the_same_file(tmp_path, every, tear):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    callback, run = start(whole, every=every)
    train(callback, run, 24, sizes=[7, 1] * 20)
    callback.on_fit_end(run)

    callback, run = start(broken, every=every)
    train(callback, run, 19, sizes=[2] * 20, save=10)  # killed at step 19
    broken.write_bytes(found := broken.read_bytes() + tear)
    callback, run = start(broken, every=every, start=10, resuming=True)
    train(callback, run, 24, sizes=[3] * 20)
    callback.on_fit_end(run)
    assert broken.read_bytes() == whole.read_bytes()
    # A line that was torn off is nobody's; what has an end is kept.
    copies = [path.read_bytes() for path in tmp_path.glob("*.stale")]
    assert copies == [found] * tear.endswith(b"\n")


def test_resuming_at_a_row_that_hears_more(path):
    callback, run = start(path)
    chunk(run, callback, 1, 2)
    callback.on_fit_end(run)
    callback, run = start(path, start=2, resuming=True)
    run.log({"more": 1.0})
    callback.on_fit_end(run)
    assert rows(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "more": 1.0}]


def test_rows_that_could_not_be_written_come_with_the_next(path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    callback, run = start(path)
    chunk(run, callback, 1, 3)
    with monkeypatch.context() as patch:
        patch.setattr("eqxmeta._files.paths.OwnFile.write_at", full)
        with pytest.raises(OSError, match="No space"):
            chunk(run, callback, 4, 6)
    chunk(run, callback, 7, 8)
    callback.on_fit_end(run)
    assert rows(path) == [{"step": s, "loss": float(loss(s))} for s in range(1, 9)]


@pytest.mark.parametrize("every", [1, 3])
def test_damage_in_the_middle_and_a_lost_end_are_told_of(path, every):
    callback, run = start(path, every=every)
    chunk(run, callback, 1, 20)
    callback.on_fit_end(run)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b'"step": 6,')] ^= 0x80
    path.write_bytes(damaged)
    with (
        pytest.warns(RuntimeWarning, match=r"(?s)lacks rows.*: at step 6\n"),
        pytest.warns(RuntimeWarning, match=r"(?s)is damaged.*run\.jsonl\.stale"),
    ):
        start(path, start=20, every=every, resuming=True)
    assert path.with_name("run.jsonl.stale").read_bytes() == damaged
    assert steps_of(path) == [s for s in range(every, 21, every) if s != 6]

    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    newest = steps_of(path)[-1] + every
    with pytest.warns(RuntimeWarning, match=f"(?s)lacks rows.* 1 less .*: at step {newest}\n"):
        start(path, start=20, every=every, resuming=True)


def thinned(lines):
    return lines[:3] + lines[5:8] + lines[9:]


def gone(lines):
    return None


def with_a_foreign_end(lines):
    return [*lines, b'{"step": 3, "who": 1}\n']


def doubled(lines):
    return [*lines[:4], lines[2], *lines[4:]]


def reversed_after_the_first(lines):
    return [lines[0], *lines[:0:-1]]


CHANGES = {
    thinned: "lacks rows.*: at step 4-5, 9\n",
    gone: "lacks rows.*: at step 1-20\n",
    (lambda lines: []): "lacks rows.*0 rows, 20 less .*: at step 1-20\n",
    (lambda lines: lines[:-4]): "lacks rows.*: at step 17-20\n",
    (lambda lines: lines[1:]): "lacks rows.*: at step 1-20\n",  # it is not known again
    with_a_foreign_end: r"damaged.*run\.jsonl\.stale",
    doubled: r"damaged.*run\.jsonl\.stale",
    reversed_after_the_first: r"damaged.*run\.jsonl\.stale",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:(?s).*of another run")
def test_nothing_vanishes_or_is_doubled_in_silence(path, tmp_path, change):
    saved = tmp_path / "saved"

    def fit(steps, resume=None):
        boring_fit(steps, callbacks=[JSONL(path), Checkpoint(saved, every=20)], resume=resume)

    fit(20)
    whole = path.read_bytes()
    lines = change(whole.splitlines(keepends=True))
    path.unlink() if lines is None else path.write_bytes(b"".join(lines))
    with pytest.warns(RuntimeWarning, match=f"(?s){CHANGES[change]}"):
        fit(30, "auto")
    kept = {json.loads(line)["step"] for line in lines or []}
    stale, damaged = path.with_name("run.jsonl.stale"), "damaged" in CHANGES[change]
    if stale.exists():  # whatever is removed is there
        assert stale.read_bytes() == b"".join(lines)
        kept = kept if damaged else set()
    assert not damaged or (stale.exists() and path.read_bytes().startswith(whole))
    assert steps_of(path) == sorted(kept | {*range(21, 31)})


def test_rows_that_were_logged_between_are_counted(path, tmp_path):
    saved = tmp_path / "saved"

    def log_x(hook, step, run):
        if hook == "on_step_end":
            run.log({"x": 1.0})

    def fit(steps, every, resume=None):
        log = Recorder("x", every=3, act=log_x)
        callbacks = [JSONL(path, every=every), log, Checkpoint(saved, every=10)]
        boring_fit(steps, callbacks=callbacks, resume=resume)

    fit(20, 10)
    fit(30, 5, "auto")  # thinned less from now on: nothing is missed
    assert steps_of(path) == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25, 27, 30]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:9] + lines[10:]))
    with pytest.warns(RuntimeWarning, match=r"lacks rows.\n.*11 rows, 2 less than the run wrote\n"):
        fit(40, 5, "auto")


def test_a_log_under_another_name_and_thinned_otherwise_lacks_nothing(path, tmp_path):
    for steps, log in ((20, JSONL(path, every=10)), (30, JSONL(path, name="mine"))):
        boring_fit(steps, callbacks=[log, Checkpoint(tmp_path / "s", every=10)], resume="auto")
    assert steps_of(path) == [10, *range(20, 31)]


def test_a_log_that_begins_later_lacks_nothing(path, tmp_path):
    for steps in (10, 20, 30):
        logs = [JSONL(path)] if steps > 10 else []
        callbacks = [*logs, Checkpoint(tmp_path / "saved", every=10)]
        boring_fit(steps, callbacks=callbacks, resume="auto")
    assert steps_of(path) == [*range(11, 31)]


DAMAGE = {
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "deep": b'{"step": 3, "x": ' + b"[" * 300 + b"NaN" + b"]" * 300 + b"}",
    "true": b'{"step": true}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "utf-16": '{"step": 3}'.encode("utf-16"),
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("line", [0, 2, 4, 5])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_line_that_breaks_the_parser_is_damage(path, damage, line):
    callback, run = start(path)
    chunk(run, callback, 1, 5)
    callback.on_fit_end(run)
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(line, DAMAGE[damage] + b"\n")
    path.write_bytes(damaged := b"".join(lines))
    with pytest.warns(RuntimeWarning, match=r"(?s)damaged.*run\.jsonl\.stale"):
        callback, run = start(path, start=5, resuming=True)
    chunk(run, callback, 6, 7)
    callback.on_fit_end(run)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    assert path.with_name("run.jsonl.stale").read_bytes() == damaged


@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN, errno.EACCES])
def test_a_log_that_the_disk_cannot_read(path, monkeypatch, code):
    callback, run = start(path)
    chunk(run, callback, 1, 5)
    callback.on_fit_end(run)
    before = path.read_bytes()

    def fail(self):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", fail)
        if code == errno.EACCES:  # says nothing of the file
            with pytest.raises(OSError, match="Permission"):
                start(path, start=5, resuming=True)
        else:
            with pytest.warns(RuntimeWarning, match=r"(?s)damaged.*run\.jsonl\.stale"):
                callback, run = start(path, start=5, resuming=True)
    if code == errno.EACCES:
        assert path.read_bytes() == before
        return
    chunk(run, callback, 6, 7)
    callback.on_fit_end(run)
    assert steps_of(path) == [6, 7]
    assert path.with_name("run.jsonl.stale").read_bytes() == before


def test_what_a_killed_run_left_is_removed(path):
    callback, run = start(path)
    chunk(run, callback, 1, 3)
    callback.on_fit_end(run)
    path.with_name(f".{path.name}.0123abcd.tmp").touch()
    start(path, start=2, resuming=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_resuming_without_a_file_starts_one(path):
    callback, run = start(path, start=5, resuming=True)
    chunk(run, callback, 6, 7)
    callback.on_fit_end(run)
    assert steps_of(path) == [6, 7]


def test_another_run_is_not_touched(path):
    callback, run = start(path)
    chunk(run, callback, 1, 3)
    callback.on_fit_end(run)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"(?s)holds a run.*Received:.*resume='auto'"):
        callback.on_fit_start(fake_run())
    callback.on_exception(run, RuntimeError())
    assert path.read_bytes() == before


def test_wrong_arguments():
    with pytest.raises(ValueError, match="every"):
        JSONL("run.jsonl", every=0)
    assert JSONL("run.jsonl").writes


def test_a_second_try_renames_the_log_of_the_first(tmp_path):
    path = tmp_path / "log.jsonl"
    boring_fit(3, callbacks=[JSONL(path)])
    old = path.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"begins anew: .* is now log\.jsonl\.stale"):
        boring_fit(2, callbacks=[JSONL(path, overwrite=True)])
    assert len(path.read_bytes().splitlines()) == 2
    assert (tmp_path / "log.jsonl.stale").read_bytes() == old
