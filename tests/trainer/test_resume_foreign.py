"""Checkpoints of sound bytes whose `meta` is nobody's, and disks that fail: whatever is resumed is
known to be sound before a file is touched."""

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from types import MappingProxyType

import jax.numpy as jnp
import pytest

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, EarlyStopping, TensorBoard

from ..boring import Recorder, boring_fit, same_bits
from ..checkpoint.test_container import rewrite

pytestmark = pytest.mark.filterwarnings("ignore:The run continues from step:RuntimeWarning")
ROOT = Path(__file__).parents[2]
NEWEST = "step-000000020.ckpt"


def callbacks(folder):
    return [
        JSONL(folder / "log.jsonl"),
        TensorBoard(folder / "board"),
        EarlyStopping("loss", patience=10**6, every=5),
        Checkpoint(folder / "saved", every=10, monitor="loss"),
    ]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(value, *names):
    def change(manifest):
        part = manifest["meta"]
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = value
        return manifest

    return change


ODD = [[], [1], "x", 1.5, True, None, {"a": [1]}, -1]
PLACES = {
    ("step",): ODD,
    ("file",): [[], 1, None],
    ("run",): [[], 1, None],
    ("config",): [[], [1], "x", 1, None],
    ("config", "fingerprint"): [[], "x", {"model": []}, {"model": {"a": 1}}, {"model": {"a": []}}],
    ("skipped",): ODD,
    ("skipped_in_a_row",): ODD,
    ("callbacks",): [[], [1], "x", {"a": 1}, {"JSONL": [1]}],
    ("callbacks", "JSONL", "log"): [[1], 1, {}],
    ("callbacks", "TensorBoard", "log"): [[1], 1, {}],
    ("callbacks", "EarlyStopping", "best"): [[1], "x", {}],
    ("callbacks", "EarlyStopping", "waited"): [[1], "x", None],
    ("callbacks", "EarlyStopping", "observed"): [[1], "x", 1],
    ("callbacks", "Checkpoint", "best_step"): [[1], "x", 1.5, {}],
    ("callbacks", "Checkpoint", "best_value"): [[1], "x", {}],
    ("callbacks", "Checkpoint", "monitor"): [[1], 1],
    ("callbacks", "Checkpoint", "mode"): [[1], 1],
}
FOREIGN = [(names, value) for names, values in PLACES.items() for value in values]
# One of each place among the fast tests.
FAST = {(names, str(values[0])) for names, values in PLACES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    boring_fit(20, callbacks=callbacks(folder))
    return folder


def check_fallback(folder, match):
    recorder = Recorder()
    with pytest.warns(RuntimeWarning) as warned:
        boring_fit(12, callbacks=[recorder, *callbacks(folder)], resume="auto")
    told = [str(w.message) for w in warned if "damaged" in str(w.message)]
    assert len(told) == 1 and NEWEST in told[0] and match in told[0]
    assert recorder.steps_of("on_fit_start") == [10]
    assert (folder / "saved" / f"{NEWEST}.stale").exists()


@pytest.mark.parametrize(
    ("names", "value"),
    [pytest.param(n, v, marks=() if (n, str(v)) in FAST else pytest.mark.slow) for n, v in FOREIGN],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_foreign_metadata_is_damage_and_the_older_file_is_taken(saved, tmp_path, names, value):
    folder = tmp_path / "run"
    copytree(saved, folder)
    path = folder / "saved" / NEWEST
    rewrite(path, put(value, *names))
    before = contents(folder)
    with pytest.raises(em.CheckpointCorrupt, match=f"(?s){NEWEST}.*Received: .*Expected: "):
        boring_fit(30, callbacks=callbacks(folder), resume=path)
    assert contents(folder) == before
    check_fallback(folder, "Received: ")


def test_a_state_of_another_step_than_it_says(saved, tmp_path):
    path = tmp_path / NEWEST
    path.write_bytes((saved / "saved" / NEWEST).read_bytes())
    rewrite(path, put(19, "step"))
    with pytest.raises(em.CheckpointCorrupt, match="a state after step 20"):
        boring_fit(30, resume=path)
    state = boring_fit(1)
    below = em.TrainState(jnp.int32(-5), state.model, state.opt_state)
    meta = em.inspect(saved / "saved" / NEWEST)["meta"]
    em.save(path, below, meta={k: v for k, v in meta.items() if k != "step"})
    with pytest.raises(em.CheckpointCorrupt, match="a state after step -5"):
        boring_fit(30, resume=path)


def test_a_fingerprint_of_what_this_run_does_not_have_is_of_another_run(saved, tmp_path):
    path = tmp_path / NEWEST
    path.write_bytes((saved / "saved" / NEWEST).read_bytes())
    rewrite(path, put({"data": {".x": "1"}}, "config", "fingerprint"))
    with pytest.raises(em.CheckpointMismatch, match="of another run"):
        boring_fit(30, resume=path)


def test_what_a_users_callback_keeps_has_the_types_that_it_says(tmp_path):
    class Counts(Recorder):
        state_types = MappingProxyType({"seen": int})

        def state_dict(self):
            return {"seen": 1, "other": "x"}

    def fit(steps, **options):
        both = [Counts("counts"), Checkpoint(tmp_path, every=10)]
        return boring_fit(steps, callbacks=both, **options)

    fit(20)
    rewrite(tmp_path / NEWEST, put("x", "callbacks", "counts", "seen"))
    with pytest.warns(RuntimeWarning, match=r'(?s)damaged.*seen="x"'):
        assert same_bits(fit(25, resume="auto"), boring_fit(25))


# What the system says of the newest file.


def failing(monkeypatch, path, code):
    real = os.stat

    def fail(where, *args, **kwargs):
        if str(where) == str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(where, *args, **kwargs)

    monkeypatch.setattr(os, "stat", fail)


@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENOENT])
def test_damage_and_absence_fall_back(tmp_path, monkeypatch, code):
    boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])
    failing(monkeypatch, tmp_path / NEWEST, code)
    recorder = Recorder()
    with pytest.warns(RuntimeWarning, match=f"(?s)Skipping.*{NEWEST}"):
        boring_fit(15, callbacks=[recorder, Checkpoint(tmp_path, every=10)], resume="auto")
    assert recorder.steps_of("on_fit_start") == [10]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ETIMEDOUT])
def test_a_refusal_says_nothing_of_the_file_and_is_raised(tmp_path, monkeypatch, code):
    boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)):
        failing(patch, tmp_path / NEWEST, code)
        boring_fit(15, callbacks=[Checkpoint(tmp_path, every=10)], resume="auto")
    assert contents(tmp_path) == before


def test_a_folder_in_the_place_of_a_checkpoint_is_gone_round(tmp_path):
    boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])
    (tmp_path / "step-000000030.ckpt").mkdir()
    with pytest.warns(RuntimeWarning, match=r"(?s)Skipping.*000000030"):
        state = boring_fit(30, callbacks=[Checkpoint(tmp_path, every=10)], resume="auto")
    assert (tmp_path / "step-000000030.ckpt.stale").is_dir()
    assert same_bits(em.load(tmp_path / "step-000000030.ckpt", state), state)


# Memory. In processes of their own, for JAX tells nobody what it takes.


def peak(folder, steps, leaves) -> float:
    command = [sys.executable, "-m", "tests.peak_memory", str(folder), str(steps), str(leaves)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.slow
def test_resuming_takes_at_most_a_leaf_more_than_starting(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    leaves, leaf = 20, 8.0  # MB each
    started = peak(tmp_path, 3, leaves)
    resumed = peak(tmp_path, 6, leaves)
    assert math.isfinite(started) and resumed - started < 1.5 * leaf
