"""A checkpoint without a model at hand, and a model without a trainer."""

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.__main__ import main
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringModel, boring_fit, same_bits
from ..helpers import tiny_mlp
from . import golden
from .test_container import rewrite

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "checkpoint" / "data" / "jax-0.10.ckpt"


def test_every_leaf_and_the_manifest_are_printed(tmp_path, capsys):
    tree = {"w": jnp.array([[1.0, -2.5]]), "n": np.int64(3), "bad": jnp.array([jnp.nan, 4.0, 2.0])}
    em.save(tmp_path / "x", tree, meta={"step": 12, "config": {"lr": 0.1}})
    manifest = em.inspect(tmp_path / "x")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'x'}: format 1, 3 leaves, sound"
    assert f"jax {jax.__version__}" in lines[1]
    assert [line.split() for line in lines[2:4]] == [["step", "12"], ["config", '{"lr":', "0.1}"]]
    assert [line.split() for line in lines[4:]] == [
        ["['bad']", "float32[3]", "140", "B", *["2", "to", "4,", "1", "not", "finite"]],
        ["['n']", "int64[]", "136", "B", "3"],
        ["['w']", "float32[1,2]", "136", "B", *["-2.5", "to", "1"]],
    ]
    assert manifest["meta"] == {"step": 12, "config": {"lr": 0.1}}


def test_every_dtype_is_printed(capsys):
    em.inspect(GOLDEN)
    out = capsys.readouterr().out
    for name in golden.DTYPES:
        assert f"['dtypes']['{name}']" in out and f"{name}[2,3]" in out
    assert "key<rbg>[]" in out


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "flipped", "dtype", "newer"])
def test_what_is_no_checkpoint_is_told_in_a_line_and_by_the_exit_code(tmp_path, capsys, damage):
    path = tmp_path / "x"
    if damage != "missing":
        em.save(path, {"w": jnp.ones(20)})
    data = path.read_bytes() if path.exists() else b""
    if damage == "folder":
        path = tmp_path
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif damage == "dtype":
        rewrite(path, lambda m: {**m, "leaves": [{**m["leaves"][0], "dtype": "no such"}]})
    elif damage == "newer":
        rewrite(path, lambda m: {**m, "format": 2})
    sys_argv, sys.argv = sys.argv, ["eqxmeta", "inspect", str(path)]
    try:
        assert main() == 1
    finally:
        sys.argv = sys_argv
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err and "Received: " in err and "Traceback" not in err


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "eqxmeta", "inspect"]
    done = subprocess.run([*command, GOLDEN], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 leaves, sound" in done.stdout
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no checkpoint at nothing.\nReceived: no such file")


def test_the_weights_of_a_run_load_into_a_bare_model(tmp_path):
    state = boring_fit(20, callbacks=[Checkpoint(tmp_path, every=10)])
    model = em.load_model(tmp_path / "step-000000020.ckpt", BoringModel())
    assert same_bits(model, state.model)


class Rates(eqx.Module):
    """What a strategy learns that learns its rates: the user's model, and a rate a parameter."""

    model: eqx.Module
    rates: eqx.Module


def test_the_users_model_is_found_in_what_a_strategy_wraps_it_in(tmp_path):
    model, like = tiny_mlp(), tiny_mlp(jax.random.key(9))
    wrapped = Rates(model, jax.tree.map(jnp.ones_like, model))
    em.save(tmp_path / "x", em.TrainState(jnp.int32(0), wrapped, optax.EmptyState()))
    assert same_bits(em.load_model(tmp_path / "x", like), model)
    whole = em.load_model(tmp_path / "x", Rates(like, like))
    assert same_bits(whole, wrapped)


def test_a_users_model_with_a_field_of_that_name_is_not_taken_for_a_wrapper(tmp_path):
    model, like = Rates(tiny_mlp(), jnp.ones(2)), Rates(tiny_mlp(jax.random.key(9)), jnp.zeros(2))
    em.save(tmp_path / "x", em.TrainState(jnp.int32(0), model, ()))
    assert same_bits(em.load_model(tmp_path / "x", like), model)
    em.save(tmp_path / "y", em.TrainState(jnp.int32(0), Rates(model, jnp.ones(1)), ()))
    assert same_bits(em.load_model(tmp_path / "y", like), model)


def test_another_model_is_refused_leaf_by_leaf(tmp_path):
    boring_fit(10, callbacks=[Checkpoint(tmp_path, every=10)])
    with pytest.raises(em.CheckpointMismatch) as caught:
        em.load_model(tmp_path / "step-000000010.ckpt", tiny_mlp())
    text = str(caught.value)
    assert "only in the file: .model.weight float32[3]" in text
    assert "only in `like`: .model.hidden.weight float32[8, 1]" in text
    assert "opt_state" not in text


class Old(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None = None


class Renamed(eqx.Module):
    kernel: jax.Array
    bias: jax.Array | None = None


W = ".weight float32[3]"


@pytest.mark.parametrize(
    ("like", "told"),
    [
        (Renamed(jnp.ones(3)), [f"only in the file: {W}", "only in `like`: .kernel float32[3]"]),
        (Old(jnp.ones(3), jnp.ones(1)), ["only in `like`: .bias float32[1]"]),
        (Old(None), [f"only in the file: {W}"]),
        (Old(jnp.ones((3, 1))), ["different: .weight is float32[3] in the file, float32[3, 1]"]),
        (Old(jnp.ones(3, "bfloat16")), ["different: .weight is float32[3] in the file, bfloat16"]),
        (Old(1.5), [f"only in the file: {W}"]),
    ],
    ids=["renamed", "added", "removed", "reshaped", "retyped", "a number"],
)
def test_a_changed_model_is_refused_and_told_on_both_sides(tmp_path, like, told):
    em.save(tmp_path / "x", Old(jnp.ones(3)))
    with pytest.raises(em.CheckpointMismatch) as caught:
        em.load(tmp_path / "x", like)
    listed = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(listed) == len(told)
    assert all(line.startswith(start) for line, start in zip(listed, told, strict=True))
