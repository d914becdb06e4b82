"""Files by somebody who knows the format, and disks that fail: nothing that is read is believed."""

import errno
import json
import os
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em
from eqxmeta._checkpoint import container as _container
from eqxmeta._checkpoint.dtypes import DTYPES, dtype_of
from eqxmeta._checkpoint.manifest import MOST_BYTES
from eqxmeta._checkpoint.save_load import read_manifest, verify

from .test_container import rewrite

LIKE = {"w": jnp.arange(3.0), "n": jnp.int32(7)}
READERS = [read_manifest, verify, em.inspect, lambda path: em.load(path, LIKE)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.ckpt"
    em.save(path, LIKE, meta={"step": 7})
    return path


def refused(path, match, readers=READERS):
    for read in readers:
        with pytest.raises(em.CheckpointCorrupt, match=match):
            read(path)


def with_leaf(**changes):
    """The first leaf of the manifest is described in another way."""
    return lambda m: {**m, "leaves": [{**m["leaves"][0], **changes}, *m["leaves"][1:]]}


# Sizes.


@pytest.mark.parametrize("megabytes", [9, pytest.param(100, marks=pytest.mark.slow)])
def test_a_manifest_that_is_too_large_is_not_read(path, megabytes):
    rewrite(path, lambda m: {**m, "meta": {"a": "x" * (megabytes * 10**6)}})
    tracemalloc.start()
    refused(path, "a manifest of [0-9,]+ bytes")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 10**6


def test_nor_is_one_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"(?s)manifest.* 2 leaves.*: 8,388,608"):
        em.save(path, LIKE, meta={"a": "x" * MOST_BYTES})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_directory_of_very_many_members_is_not_read(path):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    entry = data[start : data.index(b"PK\x01\x02", start + 4)]
    end = bytearray(data[data.rindex(b"PK\x05\x06") :])
    many = entry * (10**7 // len(entry))
    end[12:16] = len(many).to_bytes(4, "little")
    path.write_bytes(data[:start] + many + end)
    tracemalloc.start()
    refused(path, "a directory of [0-9,]+ bytes")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.slow
def test_as_many_leaves_as_a_manifest_has_room_for(tmp_path):
    # The directory's bound is never what a file of ours fails by.
    number = 30_000
    leaves = (({"path": "", "shape": [], "dtype": "int8"}, np.int8(0)) for _ in range(number))
    _container.write(tmp_path / "x", leaves, {"versions": {}, "meta": {}}, lambda: None)
    with pytest.raises(em.CheckpointCorrupt, match="two leaves of one path"):
        read_manifest(tmp_path / "x")


@pytest.mark.parametrize("shape", [[2**63], [1] * 65, [0, 2**62], {}, "", [True], [1.0], None])
def test_shapes_that_no_array_has(path, shape):
    rewrite(path, with_leaf(shape=shape))
    refused(path, "a shape of leaf")


def test_a_shape_of_very_many_huge_numbers_is_not_multiplied(path):
    rewrite(path, with_leaf(shape=[2**62] * 300_000))
    refused(path, "a shape of leaf")


def test_meta_that_is_nested_very_deeply(path):
    deep = json.loads("[" * 300 + "]" * 300)
    rewrite(path, lambda m: {**m, "meta": {"a": deep}})
    refused(path, "too deep")


@pytest.mark.parametrize("versions", [None, [], "1", {"jax": 1}])
def test_versions_that_are_none(path, versions):
    rewrite(path, lambda m: {**m, "versions": versions})
    refused(path, "`versions`")


# Dtypes: one list, by whoever the file is read.


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_is_written_read_verified_and_shown(tmp_path, name, capsys):
    array = np.ones((2, 3)).astype(dtype_of(name))
    em.save(tmp_path / "x", array)
    verify(tmp_path / "x")
    em.inspect(tmp_path / "x")
    assert f"{name}[2,3]" in capsys.readouterr().out
    loaded = em.load(tmp_path / "x", array)
    assert np.asarray(loaded).tobytes() == array.tobytes() and loaded.dtype == array.dtype


@pytest.mark.parametrize(
    "name",
    ["U2", "S3", "O", "M8[s]", "i4,f4", "V4", "float128", "float6_e2m3fn", "int1", "key<", "f4"],
)
def test_no_other_dtype_is_read_by_anybody(path, name):
    rewrite(path, with_leaf(dtype=name))
    refused(path, f"the dtype '{name}'".replace("[", r"\["))


def forge_keys(path, shape, data):
    em.save(path, data)
    rewrite(path, with_leaf(dtype="key<threefry2x32>", shape=shape))


@pytest.mark.parametrize(
    ("shape", "data"),
    [([], np.zeros(3, np.uint32)), ([2], np.zeros((3, 2), np.uint32)), ([], np.zeros(2, np.int32))],
)
def test_keys_of_other_bits_are_refused_by_all(tmp_path, shape, data):
    forge_keys(tmp_path / "x", shape, data)
    like = jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    refused(tmp_path / "x", "leaf ''", [verify, em.inspect, lambda path: em.load(path, like)])


def test_keys_of_a_generator_that_nobody_knows_are_what_their_header_says(tmp_path):
    def forged(**changes):
        em.save(tmp_path / "x", np.zeros((3, 5), np.uint32))
        rewrite(tmp_path / "x", with_leaf(dtype="key<mine>", **changes))

    forged(shape=[3])
    for read in (verify, em.inspect):
        read(tmp_path / "x")
    forged(shape=[4])
    refused(tmp_path / "x", "leaf ''", [verify, em.inspect])
    em.save(tmp_path / "x", np.zeros((3, 5), np.float32))
    rewrite(tmp_path / "x", with_leaf(dtype="key<mine>", shape=[3]))
    refused(tmp_path / "x", "leaf ''", [verify, em.inspect])


# Names.


def test_two_leaves_of_one_path(path):
    rewrite(path, with_leaf(path="['w']"))
    refused(path, "two leaves of one path")


ODD = "\x1b[2J\r\n\ud800\u202eé\x07"


def test_control_characters_reach_no_terminal(path, capsys):
    rewrite(path, with_leaf(path=ODD))
    rewrite(path, lambda m: {**m, "meta": {ODD: ODD}, "versions": {ODD: ODD}})
    em.inspect(path)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert r"\x1b[2J\r\n\ud800\u202eé\x07  int32[]" in out
    with pytest.raises(em.CheckpointMismatch) as caught:
        em.load(path, LIKE)
    assert r"only in the file: \x1b[2J\r\n\ud800" in str(caught.value)
    rewrite(path, lambda m: {**m, "format": 2, "versions": ODD})
    with pytest.raises(em.CheckpointTooNew) as newer:
        em.inspect(path)
    rewrite(path, lambda m: {**m, "format": 1, "versions": {}})
    rewrite(path, with_leaf(sha256="0" * 64))
    with pytest.raises(em.CheckpointCorrupt) as corrupt:
        verify(path)
    for error in (caught, newer, corrupt):
        assert all(line.isprintable() for line in str(error.value).split("\n"))


def test_a_file_whose_own_name_no_terminal_can_show(tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"\xff\x1b.ckpt")
    try:
        em.save(path, LIKE)
    except OSError:
        pytest.skip("a file system whose names are text")
    em.inspect(path)
    assert r"\udcff\x1b.ckpt: format 1" in capsys.readouterr().out


# What the system says.

DAMAGE = [errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ, errno.ENODATA]
ABSENCE = [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENAMETOOLONG]
REFUSAL = [errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENXIO]
KINDS = [
    *((code, em.CheckpointCorrupt) for code in DAMAGE),
    *((code, em.CheckpointNotFound) for code in ABSENCE),
    *((code, OSError) for code in REFUSAL),
]


@pytest.mark.parametrize("where", ["os.stat", "zipfile.ZipFile.open", "zipfile.ZipFile"])
@pytest.mark.parametrize(("code", "kind"), KINDS)
def test_each_kind_of_error_is_one_wherever_it_comes(path, monkeypatch, where, code, kind):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"eqxmeta._checkpoint.container.{where}", fail)
    for read in (read_manifest, verify, lambda path: em.load(path, LIKE)):
        with pytest.raises(OSError if kind is OSError else kind) as caught:
            read(path)
        monkeypatch.setattr(os.path, "isdir", lambda path: False)  # which asks `os.stat` as well
        assert not isinstance(caught.value, em.CheckpointError) or caught.type is kind
        assert os.strerror(code).lower() in str(caught.value).lower()


def test_what_is_no_file_is_absent_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    for read in (read_manifest, verify, em.inspect, lambda path: em.load(path, LIKE)):
        with pytest.raises(em.CheckpointNotFound, match="a device or a pipe"):
            read(tmp_path / "x")


# Memory.


def peak_of(function) -> int:
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_leaves_are_read_one_at_a_time_and_once(tmp_path):
    # NumPy tells `tracemalloc` what it allocates; JAX does not, so that it is kept out.
    leaf = np.ones(2_000_000, np.float32)
    path, tree = tmp_path / "x", [leaf + index for index in range(4)]
    size = leaf.nbytes
    assert peak_of(lambda: em.save(path, tree)) < 0.3 * size
    assert peak_of(lambda: verify(path)) < 0.5 * size
    assert peak_of(lambda: em.inspect(path)) < 2 * size
    with _container.reading(path) as reader:
        entry = reader.manifest["leaves"][0]
        read = lambda: reader.array(entry, leaf.shape, leaf.dtype)  # noqa: E731
        assert size < peak_of(read) < 1.5 * size
