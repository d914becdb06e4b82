"""Checkpoints with flipped bits, cut short, forged and swapped."""

import contextlib
import io
import json
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import eqxmeta as em
from eqxmeta._checkpoint import container as _container
from eqxmeta._checkpoint.save_load import read_manifest, verify
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringModel, boring_fit, same_bits
from ..checkpoint.test_container import rewrite
from .inject import Tally

LIKE = {
    "model": BoringModel(size=25_000),
    "half": jnp.ones(50, "bfloat16"),
    "key": jax.random.key(1),
    "a": jnp.zeros(7),
    "b": jnp.ones(7),
}
META = {"step": 7, "callbacks": {"x": {"y": [1.5, None]}}}


def damage(folder: Path, times: int, rng: random.Random, *, every: int = 1000) -> Tally:
    """`times` flipped bits, the file cut after every `every`th byte, and all forgeries."""
    tally = Tally()
    good, bad = folder / "good.ckpt", folder / "bad.ckpt"
    em.save(good, LIKE, meta=META)
    data = good.read_bytes()
    structure = data.index(b"manifest.json")
    for index in range(times):
        # Half of them in the manifest and the zip's directory, which are a few per cent of it all.
        position = rng.randrange(structure if index % 2 else 0, len(data))
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        bad.write_bytes(flipped)
        tally.add("flipped bits", accepted(bad, harmless=True))
    for length in range(0, len(data), every):
        bad.write_bytes(data[:length])
        tally.add("truncations", accepted(bad))
    for name, forge in forgeries(good):
        forge(bad)
        tally.add("forgeries", accepted(bad) and f"{name} was accepted")
    for name, spoil in _SPOILERS.items():
        tally.add("runs resumed", _resumed(folder / name.replace(" ", "-"), spoil))
    return tally


def accepted(path: Path, like: PyTree = LIKE, *, harmless: bool = False) -> str | None:
    """What `load`, `verify` or `inspect` took for sound, unless it is allowed to be and nothing
    changed; or that they do not agree about it."""
    found = {}
    for read in (em.load, verify, em.inspect):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                loaded = read(path, like) if read is em.load else read(path)
        except em.CheckpointCorrupt:
            found[read.__name__] = True
            continue
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {error}"
        found[read.__name__] = False
        if not harmless:
            return f"damage was accepted by {read.__name__}"
        if read is em.load and not same_bits(loaded, like):
            return "other values were loaded"
        if read_manifest(path)["meta"] != META:
            return "another `meta` was read"
    return None if len(set(found.values())) == 1 else f"damage was found by some only: {found}"


def forgeries(good: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Files by somebody who knows the format: the checksum of the manifest fits in all of them."""
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = members.pop("manifest.json")

    def forged(change=None, manifest: bytes = text, method=zipfile.ZIP_STORED):
        def forge(path: Path) -> None:
            content = dict(members)
            if change is not None:
                change(content)
            with zipfile.ZipFile(path, "w", method) as archive:
                for name, data in content.items():
                    archive.writestr(name, data)
                archive.writestr("manifest.json", manifest)
                archive.comment = b"eqxmeta sha256 " + _digest(manifest)

        return forge

    def swap(content):
        a, b = (_file_of(text, name) for name in ("['a']", "['b']"))
        content[a], content[b] = content[b], content[a]

    yield "zero length", lambda path: path.write_bytes(b"")
    yield "not a zip", lambda path: path.write_bytes(b"PK" * 1000)
    yield "two leaves swapped", forged(swap)
    yield "a leaf that is missing", forged(lambda content: content.pop("leaves/00000.npy"))
    yield "one too many", forged(lambda content: content.update({"leaves/99999.npy": b""}))
    climbing = forged(lambda content: content.update({"../" * 50 + "etc/passwd": b"x"}))
    yield "a path that climbs out", climbing
    yield "a path a mile deep", forged(lambda content: content.update({"a/" * 20_000: b"x"}))
    bomb = forged(
        lambda content: content.update({"leaves/00000.npy": bytes(10**8)}),
        method=zipfile.ZIP_DEFLATED,
    )
    yield "a zip bomb", bomb
    yield "everything compressed", forged(method=zipfile.ZIP_DEFLATED)
    yield "a manifest without end", forged(manifest=b"[" * 200_000)
    yield "a manifest of something else", forged(manifest=b'{"format": 1}')
    huge = json.loads(text)
    for leaf in huge["leaves"]:
        leaf["bytes"] = 10**15
    yield "sizes beyond the file", forged(manifest=json.dumps(huge).encode())
    for changes in (
        {"dtype": "U2"}, {"dtype": "i4,f4"}, {"dtype": "O"}, {"dtype": "key<"}, {"path": "['b']"},
        {"shape": [2**62] * 100_000}, {"shape": [0, 2**62]}, {"shape": {}}, {"shape": [True]},
    ):  # fmt: skip
        other = json.loads(text)
        other["leaves"][0] |= changes
        told = f"a leaf described by {str(changes)[:40]}"
        yield told, forged(manifest=json.dumps(other).encode())
    for where, value in {
        "meta": {"a": json.loads("[" * 300 + "]" * 300)},
        "versions": [1],
        "more": "x" * 10**7,
    }.items():
        other = {**json.loads(text), where: value}
        yield f"other {where}", forged(manifest=json.dumps(other).encode())


def _digest(data: bytes) -> bytes:
    return _container.hashlib.sha256(data).hexdigest().encode()


def _file_of(manifest: bytes, path: str) -> str:
    return next(x["file"] for x in json.loads(manifest)["leaves"] if x["path"] == path)


def _flip(folder: Path) -> None:
    path = _path(folder, 30)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def _cut(folder: Path) -> None:
    data = _path(folder, 30).read_bytes()
    _path(folder, 30).write_bytes(data[: len(data) // 2])


def _empty(folder: Path) -> None:
    _path(folder, 30).write_bytes(b"")


def _swap(folder: Path) -> None:
    shutil.move(_path(folder, 30), folder / "x")
    shutil.move(_path(folder, 20), _path(folder, 30))
    shutil.move(folder / "x", _path(folder, 20))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09}.ckpt"


def _folder(folder: Path) -> None:
    _path(folder, 30).unlink()
    _path(folder, 30).mkdir()


def _foreign(*names: str, value: Any) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        part = manifest["meta"]
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = value
        return manifest

    return lambda folder: rewrite(_path(folder, 30), change)


_SPOILERS = {
    "a flipped bit": _flip,
    "cut": _cut,
    "empty": _empty,
    "two swapped": _swap,
    "a folder": _folder,
    "config": _foreign("config", value=[]),
    "best step": _foreign("callbacks", "Checkpoint", "best_step", value=[1]),
}


def _resumed(folder: Path, spoil: Callable[[Path], None]) -> str | None:
    """`resume="auto"` falls back to the newest sound file, says so, and ends with the same bits."""

    def fit(steps):
        callbacks = [Checkpoint(folder, every=10, keep=None)]
        return boring_fit(steps, callbacks=callbacks, resume="auto")

    fit(30)
    spoil(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = fit(40)
    if not any("damaged" in str(w.message) for w in told):
        return "nobody was told"
    if not same_bits(state, boring_fit(40)):
        return "another result"
    loaded = em.load(_path(folder, 40), state)
    return None if same_bits(loaded, state) else "another file"
