"""The examples run, briefly, as a user would start them; and are as short as promised."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import eqxmeta as em
from eqxmeta.callbacks import Lambda

from .boring import same_bits

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # they compile more than they train
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short(path):
    named = "implicit_images", "navigation", "omniglot", "photos", "sinusoid"
    recipes = path.stem in named  # which rows of results are made by, too
    assert len(path.read_text().splitlines()) < (180 if recipes else 120)


def test_every_algorithm_has_its_recipes():
    given = {n for n, x in vars(em.strategies).items() if isinstance(x, type)} - {"Strategy"}
    classifiers = {"ProtoNet", "ProtoMAML", "Baseline", "BaselinePlusPlus", "SimpleShot"}
    classifiers |= {"MatchingNet", "RelationNet", "MetaOptNet"}
    # The figure of CNP, which has a loss of its own, is in docs/heads.md.
    for name, without in (("omniglot", {"Joint", "CNP"}), ("sinusoid", classifiers | {"CNP"})):
        recipes = runpy.run_path(str(EXAMPLES / f"{name}.py"))["recipes"](10)
        assert {recipe.partition("-")[0] for recipe in recipes} == given - without


@pytest.mark.slow
def test_sinusoid(tmp_path):
    out = run("sinusoid.py", "--steps", 60, cwd=tmp_path)
    assert re.search(r"one sine: MSE \d+\.\d+ before", out)
    for name in ("Joint", "MAML", "FOMAML", "Reptile"):
        assert (
            len(re.findall(rf"^{name} .*(?:\d+\.\d+ ± \d+\.\d+ *){{4}}$", out, re.MULTILINE)) == 1
        )
        folder = tmp_path / "runs/sinusoid" / name.lower()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 60
        assert (folder / "adaptation.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "checkpoints/step-000000060.ckpt").is_file()
    # Finn et al. 2017: 4.25 for the zero predictor; 3.01 for the best that does not look.
    zero, blind = (
        float(re.search(rf"^{n} +(\S+)", out, re.MULTILINE)[1]) for n in ("zero", "task-blind")
    )
    assert abs(zero - 4.25) < 0.15 and abs(blind - 3.01) < 0.15
    assert (tmp_path / "runs/sinusoid/adaptation.png").is_file()
    again = run("sinusoid.py", "--steps", 60, cwd=tmp_path)
    assert "resumed at step 60" in again
    assert out[out.index("MSE over") :] == again[again.index("MSE over") :]


@pytest.mark.slow
def test_distributed(tmp_path):
    out = run("distributed.py", "--processes", 2, "--steps", 20, cwd=tmp_path)
    assert len(re.findall(r"2 processes, 8 devices: MSE \S+ before, \S+ ±", out)) == 1
    folder = tmp_path / "runs/distributed"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20
    # (Four of each, by `conftest.py`.) Alone it goes on from there, and warns that the bits are
    # others, which `-W error` would refuse.
    command = [sys.executable, str(EXAMPLES / "distributed.py"), "--steps", "30"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resumed at step 20" in done.stdout, done.stderr
    assert "devices 8, now 4" in done.stderr


def test_sinusoid_that_is_interrupted_at_its_first_run_does_not_go_on(monkeypatch):
    fit = em.Trainer.fit

    def interrupted(trainer, *arguments):
        press = Lambda(on_fit_start=lambda run: signal.raise_signal(signal.SIGINT))
        trainer.callbacks = (press,)
        return fit(trainer, *arguments)

    monkeypatch.setattr(em.Trainer, "fit", interrupted)
    overfit_one_sine = runpy.run_path(str(EXAMPLES / "sinusoid.py"))["overfit_one_sine"]
    with pytest.raises(SystemExit) as ended:
        overfit_one_sine(10)
    assert ended.value.code == 130


@pytest.mark.slow
def test_sinusoid_in_the_papers_setting(tmp_path):
    out = run("sinusoid.py", "--paper", "--steps", 20, cwd=tmp_path)
    assert out.count("MSE over 600 new tasks") == 3


@pytest.mark.slow
def test_sinusoid_with_all_algorithms(tmp_path):
    names = "MAML", "MetaCurvature", "LearntUpdate"
    out = run("sinusoid.py", "--all", *names, "R2D2", "--steps", 20, cwd=tmp_path)
    assert re.search(r"^R2D2 +nan ± nan +\d+\.\d+ ± \d+\.\d+$", out, re.MULTILINE)
    rows = re.findall(r"^(\w+) +(?:\d+\.\d+ ± \d+\.\d+ *){4}$", out, re.MULTILINE)
    assert set(names) <= set(rows)


def test_custom_strategy_in_this_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["custom_strategy.py", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "custom_strategy.py"), run_name="__main__")
    assert re.search(r"MSE \S+ before, \S+ ±", capsys.readouterr().out)


@pytest.mark.slow
def test_custom_strategy(tmp_path):
    out = run("custom_strategy.py", "--steps", 800, cwd=tmp_path)
    before, after = re.search(r"MSE (\S+) before, (\S+) ±", out).groups()
    assert float(after) < 0.6 * float(before)


@pytest.mark.slow
def test_custom_callback(tmp_path):
    out = run("custom_callback.py", "--steps", 1000, cwd=tmp_path)
    assert re.search(r"stopped at step \d+ of 1,000: moved only", out)


def drawings(path, count=8):
    """Drawings that differ by class, in the format of the real file; of so many in each split."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 256, (3 * count, 1, 28, 28))
    noise = rng.integers(-20, 20, (3 * count, 20, 28, 28))
    images = np.clip(classes + noise, 0, 255).astype(np.uint8)
    np.savez(path, images=images, vinyals=np.repeat(["train", "val", "test"], count))


@pytest.mark.slow
def test_reweighting(tmp_path):
    drawings(tmp_path / "data.npz", count=10)
    out = run("reweighting.py", "--data", "data.npz", "--steps", 2, "--seeds", 2, cwd=tmp_path)
    rows = re.findall(r"^(accuracy|AUC), .* +(\d\.\d{3}) ± \d\.\d{3}$", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["accuracy"] * 4 + ["AUC"] * 3
    # The classes are plain to see, and so are the wrong labels.
    assert all(float(area) > 0.95 for name, area in rows if name == "AUC")
    assert (tmp_path / "reweighting.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sweep(tmp_path):
    out = run("sweep.py", "--steps", 20, cwd=tmp_path)
    assert len(re.findall(r"^outer=\S+, inner=\S+ .* ± ", out, re.MULTILINE)) == 17
    assert re.search(r"16 runs of 20 steps: \d+ s", out)


@pytest.mark.parametrize(
    "algorithm", ["MAMLPlusPlus", "MetaOptNet", "ProtoMAML", "ProtoNet-cosine", "SimpleShot"]
)
@pytest.mark.slow
def test_omniglot(tmp_path, algorithm):
    drawings(tmp_path / "data.npz")
    settings = (
        "--steps",
        2,
        "--width",
        4,
        "--test-tasks",
        20,
        "--train-ways",
        8 if algorithm == "ProtoNet-cosine" else 5,
    )
    arguments = ("--data", "data.npz", "--algorithm", algorithm, *settings)
    out = run("omniglot.py", *arguments, cwd=tmp_path)
    assert re.search(rf"{algorithm}, 5-way 1-shot(.|\n)*test accuracy .* over 20 tasks", out)


def photographs(folder):
    """36 classes of 20 small pictures: a pattern for each, with noise."""
    rng = np.random.default_rng(0)
    for number in range(36):
        (folder / f"class{number}").mkdir(parents=True)
        pattern = rng.integers(0, 256, (16, 16, 3))
        for image in range(20):
            pixels = np.clip(pattern + rng.normal(0, 10, pattern.shape), 0, 255)
            path = folder / f"class{number}" / f"{image}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.slow
def test_photos(tmp_path):
    """With the frozen body of a checkpoint, which the head of 64 features is learnt on."""
    photographs(tmp_path / "photographs")
    headless = em.nn.Conv4(3, None, size=16, width=4, key=jax.random.key(7))
    em.save(tmp_path / "body.ckpt", em.ProtoNet(em.losses.mse, optax.sgd(0.1)).init(headless))
    small = "--size", 16, "--width", 4, "--steps", 5, "--test-tasks", 5
    out = run("photos.py", "photographs", "--body", "body.ckpt", *small, cwd=tmp_path)
    percent = r" +\d+\.\d ± \d+\.\d"
    assert re.search(rf"pixel centroid{percent}{percent} *\nProtoNet{percent}{percent}", out)
    folder = tmp_path / "runs/photos/protonet-conv4-16-frozen"
    assert (folder / "confusion.png").is_file() and list((folder / "tensorboard").iterdir())
    # The body is what it was, to the bit, and the head is not.
    model = em.nn.Conv4(3, 64, size=16, width=4, key=jax.random.key(0))
    learnt = em.load_model(folder / "checkpoints/step-000000005.ckpt", model)
    assert same_bits(learnt.blocks, headless.blocks) and not same_bits(learnt.head, model.head)


def test_photos_has_a_recipe_for_every_strategy_that_classifies():
    recipes = runpy.run_path(str(EXAMPLES / "photos.py"))["recipes"]
    for frozen in (False, True):
        made = recipes(10, frozen)
        assert {name: type(strategy).__name__ for name, (strategy, *_) in made.items()} == {
            name: name for name in made
        }
    # These need a network of their own or a rule; the baselines minibatches in place of tasks.
    others = {"RelationNet", "CNP", "LearntUpdate", "Baseline", "BaselinePlusPlus", "SimpleShot"}
    strategies = {name for name in vars(em.strategies) if name[0].isupper()}
    assert made.keys() | others == strategies and not made.keys() & others


@pytest.mark.slow
def test_navigation(tmp_path):
    out = run("navigation.py", "--steps", 3, cwd=tmp_path)
    for name in ("Joint", "MAML"):
        assert re.search(rf"^{name} +(?:-\d+\.\d+ ± \d+\.\d+ *){{3}}$", out, re.MULTILINE)
    assert (tmp_path / "navigation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_implicit_images(tmp_path):
    photographs(tmp_path / "photographs")
    out = run("implicit_images.py", "photographs", "--steps", 3, "--size", 12, cwd=tmp_path)
    for name in ("learnt", "standard", "standard, Adam"):
        assert re.search(rf"^{name} +(?:-?\d+\.\d+ ± \d+\.\d+ *){{3}}$", out, re.MULTILINE)
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_omniglot_that_is_interrupted_saves_and_tells_the_shell(tmp_path):
    drawings(tmp_path / "data.npz")
    # Warned of, rightly: no evaluation came to be.
    command = [sys.executable, str(EXAMPLES / "omniglot.py"), "--data", "data.npz"]
    command += ["--algorithm", "ProtoNet", "--width", "2", "--train-ways", "2"]
    command += ["--steps", "1000000"]  # so many that the signal cannot come too late
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    log = tmp_path / "runs/omniglot/protonet/metrics.jsonl"
    try:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
    finally:
        process.kill()
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert (log.parent / f"checkpoints/step-{step:09}.ckpt").is_file()
