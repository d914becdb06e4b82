"""A file of one jax loads under another: these were written by the versions that they name."""

from pathlib import Path

import numpy as np
import pytest

import eqxmeta as em
from eqxmeta._checkpoint.save_load import read_manifest

from ..boring import same_bits
from . import golden

FILES = sorted((Path(__file__).parent / "data").glob("jax-*.ckpt"))


def test_there_is_a_file_of_each_supported_jax():
    assert [path.name for path in FILES] == ["jax-0.10.ckpt", "jax-0.12.ckpt"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_whole(path):
    like = golden.tree(value=0.0)
    loaded = em.load(path, like)
    assert not same_bits(loaded, like)
    assert same_bits(loaded, golden.tree())
    assert (np.asarray(loaded["state"].model.weight) == 1.5).all()
    meta = read_manifest(path)["meta"]
    assert meta["jax"].startswith(path.stem.removeprefix("jax-"))


def test_the_files_differ_in_nothing_but_the_versions():
    first, second = (read_manifest(path) for path in FILES)
    assert first["leaves"] == second["leaves"]
    assert first["versions"]["jax"] != second["versions"]["jax"]


@pytest.mark.parametrize("name", golden.DTYPES)
def test_every_dtype_round_trips(tmp_path, name):
    array = golden.array(name)
    em.save(tmp_path / "x", {"x": array, "scalar": array[0, 0], "empty": array[:0]})
    like = {"x": array[::-1], "scalar": array[0, 1], "empty": array[:0]}
    loaded = em.load(tmp_path / "x", like)
    assert str(loaded["x"].dtype) == name
    assert np.asarray(loaded["x"]).tobytes() == array.tobytes()
    assert np.asarray(loaded["scalar"]).tobytes() == array[0, 0].tobytes()


@pytest.mark.parametrize("name", ["float64", "int64", "uint64", "complex128"])
def test_wide_dtypes_load_as_jax_arrays_where_jax_has_them(tmp_path, name, x64):
    import jax.numpy as jnp

    array = jnp.asarray(golden.array(name)) / 1 if name[0] in "fc" else golden.array(name)
    em.save(tmp_path / "x", array)
    loaded = em.load(tmp_path / "x", array)
    assert str(loaded.dtype) == name and isinstance(loaded, jnp.ndarray)
    assert same_bits(loaded, jnp.asarray(array))
