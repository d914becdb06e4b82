import errno
import fcntl
import itertools
import json
import os
import time
import tracemalloc
import warnings
import zipfile

import equinox as eqx
import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointTooNew,
    inspect,
    load,
    save,
)
from eqxmeta._checkpoint import container as _container
from eqxmeta._checkpoint.save_load import read_manifest, verify
from eqxmeta._files import atomic as _atomic

from ..helpers import tiny_mlp, tree_allclose

DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32",
    "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4",
]  # fmt: skip


def same(x, y) -> bool:
    return tree_allclose(x, y, rtol=0, atol=0)


def small():
    return {
        "w": jnp.arange(3, dtype=jnp.float32),
        "step": jnp.int32(7),
        "h": jnp.ones(2, "bfloat16"),
    }


def rewrite(path, change=lambda manifest: manifest, *, drop=(), add=(), compress=False, sign=True):
    """A checkpoint as an adversary would alter it: every checksum fits again if `sign`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in drop}
        comment = archive.comment
    data = members.pop("manifest.json", b"{}")
    data = json.dumps(change(json.loads(data))).encode()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in [*members.items(), *add]:
            archive.writestr(name, content)
        if "manifest.json" not in drop:
            archive.writestr("manifest.json", data)
        digest = _container.hashlib.sha256(data).hexdigest().encode()
        archive.comment = b"eqxmeta sha256 " + digest if sign else comment


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "small.ckpt"
    save(path, small(), meta={"step": 7})
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_round_trips(tmp_path, dtype):
    shapes = [(), (0,), (3,), (2, 0, 3), (2, 3)]
    arrays = [(np.arange(np.prod(s, dtype=int)) % 2).reshape(s).astype(dtype) for s in shapes]
    arrays = jax.device_put(arrays)
    save(tmp_path / "x", arrays)
    loaded = load(tmp_path / "x", arrays)
    assert all(isinstance(x, jax.Array) for x in loaded)
    assert same(arrays, loaded)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_prng_keys_round_trip(tmp_path, impl, shape):
    keys = jax.random.key(3, impl=impl)
    keys = jax.random.split(keys, shape) if shape else keys
    like = jax.random.key(0, impl=impl)
    like = jax.random.split(like, shape) if shape else like
    save(tmp_path / "x", keys)
    loaded = load(tmp_path / "x", like)
    assert loaded.dtype == keys.dtype
    assert same(keys, loaded)


def test_a_generator_of_ones_own(tmp_path):
    """That JAX has no name for."""
    own = jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.array([0, seed], jnp.uint32),
        split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
        random_bits=lambda key, width, shape: jnp.zeros(shape, f"uint{width}"),
        fold_in=lambda key, data: key,
        name="own",
        tag="own",
    )
    keys = jax.random.key(3, impl=own)
    save(tmp_path / "x", keys)
    assert same(keys, load(tmp_path / "x", jax.random.key(0, impl=own)))


def test_a_key_of_another_generator_is_a_mismatch(tmp_path):
    save(tmp_path / "x", jax.random.key(0))
    with pytest.raises(CheckpointMismatch, match="key<threefry2x32>"):
        load(tmp_path / "x", jax.random.key(0, impl="rbg"))


def test_special_values_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    save(tmp_path / "x", bits.view(np.float32))
    loaded = load(tmp_path / "x", np.zeros(5, np.float32))
    assert (np.asarray(loaded).view(np.uint32) == bits).all()


def test_layouts_of_numpy_arrays_do_not_matter(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = [base.T, base[::2, ::-1], np.asfortranarray(base), base.astype(">f4"), np.float32(3)]
    save(tmp_path / "x", tree)
    loaded = load(tmp_path / "x", tree)
    assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(tree, loaded, strict=True))


def test_float64_is_not_rounded(tmp_path):
    array = np.array([1 / 3, 1e300])
    save(tmp_path / "x", array)
    loaded = load(tmp_path / "x", array)
    assert loaded.dtype == np.float64
    assert same(array, loaded)


def test_a_model_round_trips_and_keeps_what_is_not_an_array(tmp_path):
    model = eqx.nn.MLP(1, 1, 4, 1, activation=jax.nn.relu, key=jax.random.key(0))
    like = eqx.nn.MLP(1, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(1))
    save(tmp_path / "x", (model, None, 3, "text"))
    loaded, none, number, text = load(tmp_path / "x", (like, None, 4, "other"))
    assert same(eqx.filter(loaded, eqx.is_array), eqx.filter(model, eqx.is_array))
    assert loaded.activation is like.activation
    assert (none, number, text) == (None, 4, "other")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_shapes_are_enough_to_load_by(tmp_path, impl):
    def make():
        keys = jax.random.split(jax.random.key(3, impl=impl), 2)
        return {"model": tiny_mlp(), "keys": keys, "half": jnp.ones(2, "bfloat16")}

    save(tmp_path / "x", make())
    shapes = eqx.filter_eval_shape(make)
    loaded = load(tmp_path / "x", shapes)
    assert same(loaded, make())
    assert jax.random.key_impl(loaded["keys"]) == jax.random.key_impl(make()["keys"])
    other = {**shapes, "half": jax.ShapeDtypeStruct((3,), "bfloat16")}
    with pytest.raises(
        CheckpointMismatch, match=r"'half'\] is bfloat16\[2\] in the file, bf.*\[3\]"
    ):
        load(tmp_path / "x", other)


def test_no_arrays_at_all(tmp_path):
    save(tmp_path / "x", {"a": None})
    assert load(tmp_path / "x", {"a": None}) == {"a": None}


def test_numpy_reads_the_file(path):
    with np.load(path) as archive:
        assert archive["leaves/00001"] == 7


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    save(tmp_path / "x", small())
    save(tmp_path / "y", small())
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_loaded_arrays_survive_donation(path):
    state = load(path, small())
    again = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert same(load(path, small()), small())
    assert again["step"] == 8


def test_the_manifest_tells_what_is_in_the_file(path):
    manifest = read_manifest(path)
    assert manifest["format"] == 1
    assert set(manifest["versions"]) == {"python", "eqxmeta", "jax", "equinox", "optax", "numpy"}
    assert manifest["meta"] == {"step": 7}
    leaves = {leaf["path"]: (leaf["dtype"], leaf["shape"]) for leaf in manifest["leaves"]}
    assert leaves == {
        "['h']": ("bfloat16", [2]),
        "['step']": ("int32", []),
        "['w']": ("float32", [3]),
    }


@pytest.mark.parametrize(
    "meta",
    [
        {}, {"a": [1, 2.5, None, True, "ü\ud800", {"b": []}]}, {"x": 0.1 + 0.2, "n": 2**70},
        {"inf": float("inf"), "minus": -float("inf")}, {"numpy": float(np.float64(0.1))},
    ],
)  # fmt: skip
def test_meta_round_trips(tmp_path, meta):
    save(tmp_path / "x", jnp.ones(1), meta=meta)
    assert read_manifest(tmp_path / "x")["meta"] == meta


def test_nan_in_meta_round_trips(tmp_path):
    save(tmp_path / "x", jnp.ones(1), meta={"a": float("nan")})
    assert np.isnan(read_manifest(tmp_path / "x")["meta"]["a"])


@pytest.mark.parametrize(
    ("meta", "where"),
    [
        ({"a": {"b": [0, np.float32(1)]}}, r"meta\['a'\]\['b'\]\[1\]"),
        ({"a": jnp.ones(1)}, r"meta\['a'\]"),
        ({"a": {1: 2}}, r"meta\['a'\]"),
        ({"a": b"bytes"}, r"meta\['a'\]"),
        ([1], "meta"),
    ],
)
def test_meta_that_is_not_json_is_refused_by_name(tmp_path, meta, where):
    with pytest.raises(Exception) as caught:
        save(tmp_path / "x", jnp.ones(1), meta=meta)
    # A list is already refused by the annotation, whose error beartype raises in tests.
    if isinstance(meta, dict):
        assert caught.type is TypeError
        caught.match(where + "[^\\[]*\nReceived: (.|\n)*\nExpected: ")
    assert not list(tmp_path.iterdir())


def test_endless_meta_is_refused(tmp_path):
    meta = {}
    meta["a"] = meta
    with pytest.raises(TypeError, match="too deep"):
        save(tmp_path / "x", jnp.ones(1), meta=meta)


@pytest.mark.parametrize(
    "array",
    [np.array([None]), np.array(["a"]), np.zeros(1, "M8[s]"), np.zeros(1, "i4,f4")],
    ids=lambda array: str(array.dtype),
)
def test_arrays_that_jax_does_not_have_are_refused_by_name(tmp_path, array):
    with pytest.raises(TypeError, match=r"\['bad'\]"):
        save(tmp_path / "x", {"bad": array, "good": jnp.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Received: a folder that does not exist"):
        save(tmp_path / "no" / "x", jnp.ones(1))


def test_a_mismatch_lists_the_leaves_of_both_sides(path):
    like = {"w": jnp.zeros((3, 1)), "h": jnp.ones(2, "float16"), "extra": jnp.ones(4)}
    with pytest.raises(CheckpointMismatch) as caught:
        load(path, like)
    text = str(caught.value)
    assert str(path) in text
    assert "only in the file: ['step'] int32[]" in text
    assert "only in `like`: ['extra'] float32[4]" in text
    assert "different: ['w'] is float32[3] in the file, float32[3, 1] in `like`" in text
    assert "different: ['h'] is bfloat16[2] in the file, float16[2] in `like`" in text


def test_a_huge_mismatch_is_cut_short(tmp_path):
    save(tmp_path / "x", jnp.ones(1))
    with pytest.raises(CheckpointMismatch, match="and 61 more"):
        load(tmp_path / "x", [np.ones(1)] * 100)


def test_not_found(tmp_path):
    for missing in (tmp_path / "x", tmp_path, tmp_path / "x" / "y"):
        with pytest.raises(CheckpointNotFound, match="Received: "):
            load(missing, jnp.ones(1))
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "x")


def test_newer_formats_are_named(path):
    rewrite(path, lambda manifest: {"format": 2, "new": "things"})
    with pytest.raises(CheckpointTooNew, match="format 2"):
        load(path, small())


def harmless_or_refused(path, data: bytes) -> bool:
    """Whether `load` refuses the bytes; if it does not, nothing may have changed."""
    path.write_bytes(data)
    try:
        tree, meta = load(path, small()), read_manifest(path)["meta"]
    except CheckpointCorrupt:
        return True
    assert same(tree, small())
    assert meta == {"step": 7}
    return False


def test_flipped_bits_anywhere_are_refused_or_harmless(path):
    data = path.read_bytes()
    masks = itertools.cycle([1, 2, 4, 8, 16, 32, 64, 128, 255])
    refused = 0
    for position, mask in zip(range(len(data)), masks, strict=False):
        flipped = bytearray(data)
        flipped[position] ^= mask
        refused += harmless_or_refused(path, bytes(flipped))
    assert refused > 0.8 * len(data)  # harmless: dates and permissions in the zip's directory


@pytest.mark.parametrize("mask", [1, 4, 16, 128])
def test_flipped_bits_in_the_directory_are_refused_or_harmless(path, mask):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    for position in range(start, len(data)):
        flipped = bytearray(data)
        flipped[position] ^= mask
        harmless_or_refused(path, bytes(flipped))


def test_truncations_are_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        assert harmless_or_refused(path, data[:length])


def test_pages_of_zeros_are_refused(path):
    data = path.read_bytes()
    for start in range(0, len(data) - 64, 64):
        assert harmless_or_refused(path, data[:start] + bytes(64) + data[start + 64 :])


def test_bytes_before_or_after_are_harmless_or_refused(path):
    data = path.read_bytes()
    for other in (b"\0" * 100, data, b"PK\x05\x06" + bytes(18)):
        harmless_or_refused(path, other + data)
        harmless_or_refused(path, data + other)


@pytest.mark.parametrize(
    "damage",
    [
        dict(drop=["leaves/00000.npy"]),
        dict(drop=["manifest.json"]),
        dict(add=[("leaves/00009.npy", b"")]),
        dict(compress=True),
        dict(sign=False, change=lambda m: {**m, "meta": {"step": 8}}),
        dict(change=lambda m: []),
        dict(change=lambda m: {}),
        dict(change=lambda m: {**m, "format": 0}),
        dict(change=lambda m: {**m, "format": True}),
        dict(change=lambda m: {**m, "format": "1"}),
        dict(change=lambda m: {**m, "meta": None}),
        dict(change=lambda m: {**m, "leaves": 5}),
        dict(change=lambda m: {**m, "leaves": m["leaves"][:2]}),
        dict(change=lambda m: {**m, "leaves": m["leaves"] + m["leaves"][:1]}),
        dict(change=lambda m: {**m, "leaves": [{**leaf, "bytes": 10**30} for leaf in m["leaves"]]}),
        dict(change=lambda m: {**m, "leaves": [{**leaf, "shape": [-1]} for leaf in m["leaves"]]}),
        dict(change=lambda m: {**m, "leaves": [{**leaf, "shape": "3"} for leaf in m["leaves"]]}),
        dict(change=lambda m: {**m, "leaves": [{**leaf, "path": 3} for leaf in m["leaves"]]}),
    ],
    ids=lambda d: "-".join(d),
)
def test_altered_files_are_refused_even_if_signed(path, damage):
    rewrite(path, **damage)
    for read in (read_manifest, verify, lambda path: load(path, small())):
        with pytest.raises(
            CheckpointCorrupt, match=r"small\.ckpt(.|\n)*Received: (.|\n)*Expected: "
        ):
            read(path)


@pytest.mark.parametrize(
    ("name", "shape"), [("['w']", [10**6, 10**6]), ("['w']", [0, 2**60]), ("['w']", [2])]
)
def test_a_forged_shape_allocates_nothing(path, name, shape):
    forged = {"shape": shape}
    rewrite(
        path,
        lambda m: {
            **m,
            "leaves": [{**x, **forged} if x["path"] == name else x for x in m["leaves"]],
        },
    )
    with pytest.raises(CheckpointMismatch):
        load(path, small())
    if shape != [0, 2**60]:
        like = {**small(), "w": np.broadcast_to(np.float32(0), shape)}
        with pytest.raises(CheckpointCorrupt, match=r"\['w'\]"):
            load(path, like)


def test_a_forged_dtype_is_refused(path):
    rewrite(
        path,
        lambda m: {**m, "leaves": [{**x, "dtype": "int32"} for x in m["leaves"]]},
    )
    like = {"w": jnp.zeros(3, jnp.int32), "step": jnp.int32(7), "h": jnp.ones(2, jnp.int32)}
    with pytest.raises(CheckpointCorrupt):
        load(path, like)


def test_damage_in_a_leaf_is_named(path):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("leaves/00002.npy").header_offset
    position = data.index(small()["w"].tobytes(), offset)
    path.write_bytes(data[:position] + b"\xff" + data[position + 1 :])
    with pytest.raises(CheckpointCorrupt, match=r"leaf \"\['w'\]\""):
        load(path, small())
    with pytest.raises(CheckpointCorrupt, match=r"leaf \"\['w'\]\""):
        verify(path)
    read_manifest(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    other = tmp_path / "x"
    for content in (b"", b"not a zip", b"PK\x05\x06" + bytes(18)):
        other.write_bytes(content)
        with pytest.raises(CheckpointCorrupt):
            load(other, jnp.ones(1))
    np.savez(tmp_path / "y.npz", a=np.ones(3))
    with pytest.raises(CheckpointCorrupt):
        load(tmp_path / "y.npz", np.ones(3))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    monkeypatch.setattr("pickle.dump", None)
    monkeypatch.setattr("pickle.dumps", None)
    save(tmp_path / "x", tiny_mlp())
    load(tmp_path / "x", tiny_mlp())


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "zipfile.ZipFile.open"])
def test_a_failed_save_leaves_the_old_file_alone(path, monkeypatch, where):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise Boom

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(Boom):
            save(path, {"other": jnp.zeros(100)})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_file_alone(path, monkeypatch):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            save(path, {"other": jnp.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_synced_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(*args):
        calls.append("replace")
        replace(*args)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path / "x", jnp.ones(1))
    assert calls == ["file", "replace", "folder"]


def test_a_symbolic_link_stays_one(path):
    link = path.with_name("link")
    link.symlink_to(path)
    save(link, {"new": jnp.ones(1)})
    assert link.is_symlink()
    assert same(load(path, {"new": jnp.zeros(1)}), {"new": jnp.ones(1)})


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = tmp_path / ".step-000000001.ckpt.0123abcd.tmp"
    mine = tmp_path / ".notes.tmp"
    dead.write_bytes(b"half")
    mine.write_bytes(b"of the user")
    with _atomic.replacing(tmp_path / "step-000000002.ckpt") as file:
        _atomic.remove_leftovers(tmp_path, "step-*.ckpt")
        assert not dead.exists()
        file.write(b"whole")
    assert (tmp_path / "step-000000002.ckpt").read_bytes() == b"whole"
    assert mine.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_the_dead_are_known_by_their_silence(tmp_path, monkeypatch, code):
    def unknown(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unknown)
    dead = tmp_path / ".step-000000001.ckpt.0123abcd.tmp"
    dead.write_bytes(b"half")
    os.utime(dead, (time.time() - 2 * 3600,) * 2)
    with _atomic.replacing(tmp_path / "step-000000002.ckpt") as file:
        _atomic.remove_leftovers(tmp_path, "step-*.ckpt")
        assert not dead.exists()
        file.write(b"whole")
    assert (tmp_path / "step-000000002.ckpt").read_bytes() == b"whole"


def test_large_leaves_are_not_copied_on_the_way_to_the_disk(tmp_path):
    array = np.zeros(4_000_000, np.float32)
    tracemalloc.start()
    save(tmp_path / "x", array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_no_warnings_for_odd_files(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewrite(path, lambda m: m)
        load(path, small())


def test_errors_share_a_base():
    for error in (CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound, CheckpointTooNew):
        assert issubclass(error, CheckpointError)


@pytest.mark.parametrize(
    "forged",
    [dict(shape=[2]), dict(shape=[10**6] * 2), dict(dtype="int32"), dict(dtype="nonsense")],
)
def test_without_a_model_the_manifest_is_not_believed_either(path, capsys, forged):
    def change(manifest):
        leaves = [{**x, **forged} if x["path"] == "['w']" else x for x in manifest["leaves"]]
        return {**manifest, "leaves": leaves}

    rewrite(path, change)
    for read in (verify, inspect):
        with pytest.raises(CheckpointCorrupt, match=r"leaf .*\['w'\]"):
            read(path)
    assert capsys.readouterr().out == ""
