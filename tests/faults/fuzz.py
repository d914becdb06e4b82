"""Whatever hypothesis makes of a checkpoint's bytes, its manifest, a run's metadata and its logs.

A file is refused by an error of ours, or nothing changed; `load`, `verify` and `inspect` agree; a
run that is resumed goes on, from this file or an older one.
"""

import contextlib
import copy
import io
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jax.numpy as jnp
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eqxmeta as em
from eqxmeta._checkpoint.save_load import read_manifest, verify
from eqxmeta.callbacks import JSONL, Checkpoint, EarlyStopping, TensorBoard

from ..boring import boring_fit
from ..checkpoint.test_container import rewrite
from ..fake_run import chunk, fake_run
from .damage import META, accepted
from .inject import Tally

LIKE = {"a": jnp.arange(5.0), "b": [jnp.ones((2, 3), "bfloat16"), jnp.int32(7)]}

# Bytes: what is done to them one after the other, each at a place from 0 to 1.

_ODD = (0, 1, 0x7F, 0x80, 0xFF, *b"PK[]{}\"'\\\n0-e")
_numbers = st.sampled_from([2**k - d for k in (8, 16, 31, 32, 62, 63, 64) for d in (0, 1)])
_changes = st.one_of(
    st.tuples(st.just("put"), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("put"), st.sampled_from(_ODD).map(lambda x: bytes([x]))),
    st.tuples(st.just("put"), _numbers.map(lambda n: (n % 2**64).to_bytes(8, "little"))),
    st.tuples(st.just("insert"), st.binary(max_size=20)),
    st.tuples(st.just("insert"), st.sampled_from([b"[" * 5000, b'{"a":' * 2000, b"9" * 5000])),
    st.tuples(st.just("insert"), st.just(b"\n")),
    st.tuples(st.just("drop"), st.integers(1, 300)),
    st.tuples(st.just("repeat"), st.integers(1, 300)),
    st.tuples(st.just("cut"), st.none()),
)
mutations = st.lists(st.tuples(_changes, st.floats(0, 1)), min_size=1, max_size=4)


def mutated(data: bytes, changes: Any) -> bytes:
    for (how, what), where in changes:
        at = int(where * len(data))
        if how == "put":
            data = data[:at] + what + data[at + len(what) :]
        elif how == "insert":
            data = data[:at] + what + data[at:]
        elif how == "drop":
            data = data[:at] + data[at + what :]
        elif how == "repeat":
            data = data[:at] + data[at : at + what] + data[at:]
        else:
            data = data[:at]
    return data


# JSON: values in the place of others.

_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), _numbers, st.floats(), st.text(max_size=5),
    st.sampled_from(["U2", "float32", "i4,f4", "key<rbg>", "\x1b[2J", "\ud800", "f" * 300]),
)  # fmt: skip
values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
replacements = st.lists(st.tuples(st.integers(0, 10**6), values), min_size=1, max_size=3)


def replaced(tree: Any, changes: Any) -> Any:
    """`tree` with other values at some of its places, which are counted."""
    tree = copy.deepcopy(tree)
    for index, value in changes:
        places = list(_places(tree))
        holder, key = places[index % len(places)]
        if index % 7 == 0:
            del holder[key]
        else:
            holder[key] = value
        if not tree:
            break
    return tree


def _places(tree: Any):
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


class Fuzz:
    """Sound files, and what must hold of others that were made of them."""

    def __init__(self, folder: Path):
        self.good, self.bad, self.run = folder / "good", folder / "bad", folder / "run"
        em.save(self.good, LIKE, meta=META)
        self.data = self.good.read_bytes()
        self.manifest = read_manifest(self.good)
        self._saved = folder / "saved"
        boring_fit(20, callbacks=self._callbacks(self._saved))
        self._log = (self._saved / "log.jsonl").read_bytes()
        (self._events,) = (self._saved / "board").glob("*tfevents*")

    def _callbacks(self, folder: Path):
        early = EarlyStopping("loss", patience=10**6, every=5)
        logs = [JSONL(folder / "log.jsonl"), TensorBoard(folder / "board", every=1)]
        return [*logs, early, Checkpoint(folder / "ckpt", every=10, monitor="loss")]

    def container(self, changes: Any) -> None:
        self.bad.write_bytes(mutated(self.data, changes))
        problem = accepted(self.bad, LIKE, harmless=True)
        assert problem is None, problem

    def signed(self, changes: Any) -> None:
        """A manifest whose checksum is sound: what is in it may be another's, and is no harm."""
        self.bad.write_bytes(self.data)
        rewrite(self.bad, lambda manifest: replaced(manifest, changes))
        outcomes = []
        for read in (verify, em.inspect, lambda path: em.load(path, LIKE)):
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    read(self.bad)
            except em.CheckpointError as error:
                outcomes.append(type(error))
                text = str(error)
            else:
                outcomes.append(None)
                text = out.getvalue()
            assert all(line.isprintable() for line in text.split("\n")), text
        assert outcomes[0] == outcomes[1], outcomes
        assert outcomes[2] in (outcomes[0], em.CheckpointMismatch), outcomes

    def metadata(self, changes: Any) -> None:
        """What a run says of itself: it goes on, from the older file if need be, or is refused
        before anything is touched."""
        self._fresh()
        path = self.run / "ckpt" / "step-000000020.ckpt"
        rewrite(path, lambda m: {**m, "meta": replaced(m["meta"], changes)})
        before = {p: p.read_bytes() for p in self.run.rglob("*") if p.is_file()}
        try:
            state = boring_fit(20, callbacks=self._callbacks(self.run), resume="auto")
        except em.CheckpointError:
            assert before == {p: p.read_bytes() for p in self.run.rglob("*") if p.is_file()}
        else:
            assert int(state.step) == 20

    def rows(self, changes: Any) -> None:
        """A log: the run goes on, all lines are sound and in order, and what was there is there
        still, unless only its end was torn."""
        self._fresh()
        path = self.run / "log.jsonl"
        data = mutated(self._log, changes)
        path.write_bytes(data)
        callback = JSONL(path)
        run = fake_run(callback, start=20, resuming=True)
        callback.load_state_dict({})
        callback.on_fit_start(run)
        chunk(run, callback, 21, 23)
        callback.on_fit_end(run)
        written = [json.loads(line) for line in io.BytesIO(path.read_bytes())]
        assert all(type(row["step"]) is int for row in written)
        assert [row["step"] for row in written[-3:]] == [21, 22, 23]
        copies = [stale.read_bytes() for stale in self.run.glob("*.stale*")]
        lost = [line for line in io.BytesIO(data) if line not in path.read_bytes()]
        assert data in copies or all(_may_go(line, written) for line in lost), lost

    def events(self, changes: Any) -> None:
        """An event file: it stays as it is, and TensorBoard reads what follows, or we say so."""
        self._fresh()
        path = self.run / "board" / self._events.name
        data = mutated(self._events.read_bytes(), changes)
        path.write_bytes(data)
        callback = TensorBoard(self.run / "board", every=1)
        run = fake_run(callback, start=20, resuming=True)
        callback.load_state_dict({})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            callback.on_fit_start(run)
        chunk(run, callback, 21, 23)
        callback.on_fit_end(run)
        assert path.read_bytes() == data
        if not any("cannot show" in str(w.message) for w in told):
            reader = EventAccumulator(str(self.run / "board"), {"scalars": 0}).Reload()
            assert [x.step for x in reader.Scalars("train/loss")][-3:] == [21, 22, 23]

    def _fresh(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self._saved, self.run)


def _may_go(line: bytes, written: list[dict[str, Any]]) -> bool:
    """A torn end, the row of a step that is taken again, and the newest, which is written anew: a
    number of 5,000 digits is infinite then."""
    step = json.loads(line)["step"] if line.endswith(b"\n") else 21
    newest = max((row["step"] for row in written[:-3]), default=20)
    return step > 20 or step == newest


def fuzz(folder: Path, rng: random.Random, minutes: float = 0, examples: int = 100) -> Tally:
    """Every target in turn, `examples` at a time, at least once and until `minutes` are over."""
    checks, tally = Fuzz(folder), Tally()
    targets: list[tuple[Callable[[Any], None], Any, int]] = [
        (checks.container, mutations, 10),
        (checks.signed, replacements, 10),
        (checks.rows, mutations, 2),
        (checks.events, mutations, 1),
        (checks.metadata, replacements, 1),
    ]
    end = time.monotonic() + 60 * minutes
    while True:
        for check, strategy, weight in targets:
            _try(check, strategy, max(1, examples * weight // 10), rng.getrandbits(32), tally)
        if time.monotonic() > end or len(tally.lost) > 20:
            return tally


def _try(check: Callable, strategy: Any, examples: int, seed: int, tally: Tally) -> None:
    def counted(changes: Any) -> None:
        tally.add(check.__name__)
        check(changes)

    few = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    test = hypothesis.seed(seed)(few(hypothesis.given(strategy)(counted)))
    try:
        test()
    except Exception as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        tally.add(check.__name__, f"{type(error).__name__}: {error}\n{notes}"[-3000:])
