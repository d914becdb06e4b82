"""Where a path of the user's is: what is no path is refused, `~` is the home, and what a run writes
is decided when it begins."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import eqxmeta as em
from eqxmeta.__main__ import main
from eqxmeta._callback.drawing import Drawing
from eqxmeta.callbacks import (
    JSONL,
    AdaptationPlot,
    Checkpoint,
    Confusion,
    Lambda,
    TensorBoard,
)

from ..boring import BoringModel, boring_fit, same_bits

pytestmark = pytest.mark.usefixtures("as_users_run_it")

IMAGES = em.tasks.Episodes(np.zeros((4, 2, 2), np.uint8), [0, 0, 1, 1], 2, 1, 1)
WAVES = em.tasks.Sinusoid(shots=2, queries=2)

DOORS = {
    "save": lambda path: em.save(path, BoringModel()),
    "load": lambda path: em.load(path, BoringModel()),
    "load_model": lambda path: em.load_model(path, BoringModel()),
    "inspect": em.inspect,
    "resume": lambda path: boring_fit(2, resume=path),
    "Checkpoint": lambda path: Checkpoint(path, every=1),
    "TensorBoard": TensorBoard,
    "JSONL": JSONL,
    "AdaptationPlot": lambda path: AdaptationPlot(WAVES, path),
    "Confusion": lambda path: Confusion(IMAGES, path),
    "from_folder": em.data.from_folder,
    "split": lambda path: em.data.from_folder(Path(__file__).parent, path),
    "from_npz": em.data.from_npz,
    "omniglot": em.data.omniglot,
}
NO_PATHS = {
    "gs://bucket/run": "is a URL.*'gs://bucket/run'.*a path of this machine",
    "s3://bucket": "is a URL.*mounted",
    Path("hdfs://host/run"): "is a URL.*'hdfs:/host/run'",  # as `Path` writes it
    "file:///tmp/run": "is a URL.*file://",
    "~nobody-of-this-name/run": "begins with the home of nobody.*'./~'",
    "": "is empty",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.mark.parametrize("path", NO_PATHS, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_path_is_refused_at_every_door(here, door, path):
    with pytest.raises(ValueError, match=f"(?s)`.*=...\\)` {NO_PATHS[path]}") as caught:
        DOORS[door](path)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)
    assert os.listdir(here) == ["home"]


def test_the_command_refuses_it_too(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eqxmeta", "inspect", "gs://bucket/run.ckpt"])
    assert main() == 1
    assert "is a URL" in capsys.readouterr().err


def run_into(folder, *callbacks, steps=4, **options):
    """A run with every callback that writes, into a folder that may be relative or of `~`."""
    callbacks = [
        JSONL(f"{folder}/log.jsonl"),
        TensorBoard(f"{folder}/board", every=1),
        Checkpoint(f"{folder}/saved", every=2),
        *callbacks,
    ]
    return boring_fit(steps, callbacks=callbacks, **options), callbacks


def steps_in(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_tilde_is_the_home(here):
    state, _ = run_into("~/run")
    home = here / "home" / "run"
    assert steps_in(home) == [1, 2, 3, 4] and list((home / "board").glob("*tfevents*"))
    newest = "~/run/saved/step-000000004.ckpt"
    assert same_bits(em.load(newest, state), state)
    assert same_bits(em.load_model(newest, state.model), state.model)
    assert em.inspect(newest)["meta"]["step"] == 4
    resumed = boring_fit(6, resume=newest, callbacks=[Checkpoint("~/more", every=9)])
    assert same_bits(resumed, boring_fit(6))
    em.save("~/model.ckpt", state.model)
    assert (here / "home" / "model.ckpt").is_file()
    np.savez(here / "home" / "some.npz", images=np.zeros((2, 3, 3), np.uint8), labels=[0, 1])
    assert len(em.data.from_npz("~/some.npz").images) == 2
    assert len(em.data.from_folder("~/some.npz").images) == 2
    with pytest.raises(FileNotFoundError, match=f"no {here}/home/omniglot28.npz"):
        em.data.omniglot("~")
    with pytest.raises(FileNotFoundError, match=f"one of {here}/home/train.txt"):
        em.data.from_folder(here, "~/train.txt")
    assert os.listdir(here) == ["home"]


def test_a_file_may_be_called_so(here):
    em.save("./~model", BoringModel())
    assert "~model" in os.listdir(here)
    em.save("a:b", BoringModel())
    assert "a:b" in os.listdir(here)


def test_the_working_folder_at_the_begin_of_the_run_counts(here, monkeypatch):
    """Not that in which the callbacks were made, nor where a callback goes meanwhile."""
    (here / "there").mkdir()
    (here / "elsewhere").mkdir()
    wander = Lambda(every=1, on_step_end=lambda run: os.chdir(here / "elsewhere"))
    start = Lambda(on_fit_start=lambda run: os.chdir(here / "home"), name="start")
    monkeypatch.chdir(here / "there")
    state, (*_, checkpoint, _, _) = run_into("run", wander, start)
    assert os.getcwd() == str(here / "elsewhere")
    assert os.listdir(here / "elsewhere") == os.listdir(here / "home") == []
    assert steps_in(here / "there" / "run") == [1, 2, 3, 4]
    assert checkpoint.last_path == here / "there" / "run" / "saved" / "step-000000004.ckpt"
    assert same_bits(em.load(checkpoint.last_path, state), state)


class Dot(Drawing):
    """The smallest picture."""

    tag = "dot"

    def check(self, strategy, model):
        os.chdir("/")

    def draw(self, run, title):
        return Figure(figsize=(1, 1))


def test_a_picture_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    boring_fit(1, callbacks=[Dot("dot.png", every=None, name=None)])
    assert os.listdir(tmp_path) == ["dot.png"]


def test_two_runs_of_the_same_callbacks_in_two_folders(here, monkeypatch):
    log, saved = JSONL("log.jsonl"), Checkpoint("saved", every=2)
    for steps, name in ((4, "one"), (6, "two")):
        (here / name).mkdir()
        monkeypatch.chdir(here / name)
        boring_fit(steps, callbacks=[log, saved])
        assert steps_in(here / name) == list(range(1, steps + 1))
        assert saved.last_path == here / name / "saved" / f"step-00000000{steps}.ckpt"
    monkeypatch.chdir(here / "one")
    relative = Path("saved/step-000000004.ckpt")
    wander = Lambda(on_fit_start=lambda run: os.chdir(here), name="wander")
    state = boring_fit(6, callbacks=[wander, log, saved], resume=relative)
    assert same_bits(state, boring_fit(6))
    assert steps_in(here / "one") == [1, 2, 3, 4, 5, 6]


def test_another_folder_may_be_assigned_between_runs(here):
    saved = Checkpoint("one", every=2)
    boring_fit(2, callbacks=[saved])
    saved.folder = Path("~/two")
    boring_fit(2, callbacks=[saved])
    assert saved.last_path == here / "home" / "two" / "step-000000002.ckpt"
    saved.folder = Path("gs://bucket")
    with pytest.raises(ValueError, match="is a URL"):
        boring_fit(2, callbacks=[saved])
