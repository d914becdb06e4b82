"""By what a resumed run knows its own, beyond the shapes of its arrays."""

import enum
import functools
import hashlib
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._checkpoint.array_facts import agree
from eqxmeta._checkpoint.fingerprint import fingerprint
from eqxmeta._trainer.summary import describe
from eqxmeta.callbacks import Checkpoint

from ..boring import boring_fit, host_batch

ROOT = Path(__file__).parents[2]


def crop(image, *, key):
    return image


class Scaled(eqx.Module):
    """A model with all that a checkpoint's arrays say nothing of."""

    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    scale: float
    activation: Callable

    def __init__(self, *, rate=0.1, scale=1.0, activation=jax.nn.relu):
        self.linear = eqx.nn.Linear(4, 2, key=jax.random.key(0))
        self.dropout = eqx.nn.Dropout(rate)
        self.scale = scale
        self.activation = activation

    def __call__(self, x, *, key=None):
        return self.activation(self.scale * self.dropout(self.linear(x), key=key))


CROPS = jax.jit(crop), functools.partial(crop)


def _episodes(*, first=0.0, augment=CROPS, queries=2):
    images = np.zeros((12, 4), np.float32)
    images[0, 0] = first
    labels = np.repeat(np.arange(3), 4)
    return em.tasks.Episodes(images, labels, 2, 1, queries, augment=list(augment))


def _fit_scaled(folder, model, tasks, steps):
    inner = em.InnerLoop(optax.sgd(0.1), 1)
    strategy = em.MAML(em.losses.cross_entropy, inner, optax.adam(0.1))
    options = {"meta_batch_size": 2, "callbacks": [Checkpoint(folder, every=2)], "summary": False}
    return em.Trainer(strategy, **options).fit(model, tasks, steps, resume="auto")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run after two steps, which those who are refused leave as it is."""
    folder = tmp_path_factory.mktemp("saved")
    _fit_scaled(folder, Scaled(), _episodes(), 2)
    return folder


@pytest.mark.parametrize(
    ("model", "tasks", "named"),
    [
        (Scaled(rate=0.2), _episodes(), r"model\.dropout\.p=0\.1.*model\.dropout\.p=0\.2"),
        (Scaled(scale=2.0), _episodes(), r"model\.scale=1\.0.*model\.scale=2\.0"),
        (Scaled(activation=jnp.tanh), _episodes(), r"model\.activation=relu.*activation=tanh"),
        (Scaled(), _episodes(first=1.0), r"tasks\.images=float32\[12, 4\] about.*tasks\.images="),
        (Scaled(), _episodes(augment=[jax.jit(crop)]), r"tasks\.augment\[1\]=partial.*=nothing"),
        (Scaled(), _episodes(queries=3), r"tasks\.queries=2.*tasks\.queries=3"),
    ],
)
def test_a_model_or_tasks_with_the_same_arrays_but_other_parts(saved, model, tasks, named):
    with pytest.raises(em.CheckpointMismatch, match=f"(?s)is of another run.*{named}"):
        _fit_scaled(saved, model, tasks, 4)


def test_a_model_and_tasks_of_the_same_parts(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    assert int(_fit_scaled(tmp_path, Scaled(), _episodes(), 4).step) == 4


@pytest.mark.slow
def test_functions_are_known_again_in_another_process(tmp_path):
    # What a jitted function, a bound method or an object prints of itself is where in memory it is.
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from tests.checkpoint import test_fingerprint as t
class Turn:
    def __call__(self, image, *, key): return image
    def turned(self, image, *, key): return image
augment = [t.jax.jit(t.crop), Turn(), Turn().turned]
state = t._fit_scaled(sys.argv[2], t.Scaled(), t._episodes(augment=augment), int(sys.argv[3]))
print(int(state.step))
"""
    for steps in ("2", "4"):
        command = [sys.executable, "-c", program, str(ROOT), str(tmp_path), steps]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip().endswith(steps), done.stderr


class Act(enum.Enum):
    RELU = "relu", jax.nn.relu


def test_a_fingerprint_reads_the_same_in_every_process():
    tree = {
        "names": frozenset("abcdefgh"),
        "many": list(range(99)),
        "layers": [eqx.nn.Linear(2, 2, key=jax.random.key(0))] * 60,
        "act": Act.RELU,
        crop: eqx.filter_jit(crop),
        "lazy": mock.MagicMock(),
    }
    found = fingerprint(tree, values=True)
    assert found["['names']"] == "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}"
    assert found["['act']"] == "Act.RELU"
    assert found["[crop]"] == "crop"
    assert found["['lazy']"] == "MagicMock"
    assert "['many'][...]" in found and "['layers'][...]" not in found
    assert found["['layers'][59].use_bias"] == "True"
    assert not any("0x" in fact for fact in (*found, *found.values()))
    # Of equal dicts the order tells nothing.
    forwards, backwards = ({str(i): i for i in order} for order in (range(60), range(59, -1, -1)))
    assert fingerprint(forwards, values=True) == fingerprint(backwards, values=True)


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.zeros((0, 3), np.float32), "float32[0, 3] about 0 ± 0"),
        (np.array([1.0, np.nan, 3.0]), "float64[3] of 1.0, nan, 3.0"),
        (np.array([1.0, np.nan, 3.0] * 3), "float64[9] about 2 ± 1 in order "),
        (np.array([object()]), "object[1]"),
        (np.array(["a"], np.dtypes.StringDType()), "StringDType()[1]"),
        (jax.random.key(0), "uint32[2] "),
    ],
)
def test_what_is_told_of_arrays(array, wanted):
    assert fingerprint(array, values=True)[""].startswith(wanted)


def test_data_that_another_processor_computed_is_the_same_data():
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    facts = [fingerprint(y, values=True)[""] for y in (x, x * np.float32(1 + 3e-7), x * 1.1)]
    assert agree(facts[0], facts[1])
    assert not agree(facts[0], facts[2])
    whole = [fingerprint(y, values=True)[""] for y in (np.arange(9), np.arange(9)[::-1])]
    assert not agree(*whole)


@pytest.mark.parametrize("scale", [1e200, 1.7e308])
def test_data_whose_spread_overflows_is_its_own(scale):
    x = np.array([scale, -scale, 0.5 * scale, 3.0])
    fact = fingerprint(x, values=True)[""]
    assert agree(fact, fact)
    assert not agree(fact, fingerprint(x[:3], values=True)[""])


_RANDOM = np.random.default_rng(0)
LARGE = {
    # A spread that a sum of squares, less the square of the sum, would not find in float64.
    "offset": _RANDOM.normal(1e8, 1, (700, 900)),
    "steps": np.repeat(np.float32([-1e3, 0, 0.5, 1e6]), 200_000),
    "bfloat16": np.asarray(jnp.linspace(0, 1, 600_000, dtype=jnp.bfloat16)),
    "complex": _RANDOM.normal(size=(900, 700)) * np.exp(1j),
    "transposed": _RANDOM.normal(size=(700, 900)).T,
    "labels": _RANDOM.integers(0, 255, (900, 900)).astype(np.uint8)[:, ::3],
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_array_is_told_as_if_it_were_looked_at_at_once(kind):
    x = LARGE[kind]
    fact = fingerprint(x, values=True)[""]
    if kind == "labels":
        assert fact.endswith(hashlib.sha256(x.tobytes()).hexdigest()[:16])
    else:
        numbers = np.abs(x).astype(float) if kind == "complex" else x.astype(float)
        flat = numbers.ravel()
        weights = np.cos(np.arange(flat.size) % 262_139)
        order = weights @ (flat - flat.mean()) / flat.size**0.5
        told, _, last = fact.rpartition(" in order ")
        assert told.endswith(f" about {numbers.mean():.6g} ± {numbers.std():.6g}")
        assert abs(float(last) - order) < 1e-4 * numbers.std()
    assert fingerprint(x.copy(order="F"), values=True)[""] == fact


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_large_array_is_not_copied(dtype, on_device):
    x = np.zeros((4000, 10_000), dtype).T  # 160 MB, in another order than that of its indices
    x = jnp.asarray(x) if on_device else x
    tracemalloc.start()
    fingerprint(x, values=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6


class HostA(dict):
    """Batches from the host."""


class HostB(HostA):
    """Others."""


def test_another_source_on_the_host(tmp_path):
    def fit(source, steps):
        tasks = source({step: host_batch(step) for step in range(4)})
        return boring_fit(
            steps, tasks=tasks, callbacks=[Checkpoint(tmp_path, every=2)], resume="auto"
        )

    fit(HostA, 2)
    with pytest.raises(em.CheckpointMismatch, match=r"(?s)tasks=HostA.*tasks=HostB"):
        fit(HostB, 4)


def test_a_later_library_may_have_more_fields(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)

    def later(*args, **kwargs):
        config = describe(*args, **kwargs)
        config["fingerprint"]["tasks"][".novel"] = "False"
        return config

    with mock.patch("eqxmeta._trainer.trainer.describe", later):
        with pytest.raises(em.CheckpointMismatch, match=r"(?s)tasks\.novel=nothing.*=False"):
            _fit_scaled(tmp_path, Scaled(), _episodes(), 4)
        versions = mock.patch("eqxmeta._trainer.identity.library_versions", lambda: {"jax": "9.9"})
        with versions, pytest.warns(RuntimeWarning, match=r"now 9\.9.* not to the bit"):
            assert int(_fit_scaled(tmp_path, Scaled(), _episodes(), 4).step) == 4


def test_data_is_read_only_by_runs_that_save(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr("eqxmeta._trainer.summary.fingerprint", read)
    assert int(boring_fit(2).step) == 2


@pytest.mark.parametrize("forged", ["about q", "about 1", "about ", "of 1, 2, x", "of 1", "of"])
def test_a_forged_fact_is_another_one(forged):
    for fact in ("float32[3] about 1 ± 2 in order 3", "float32[2] of 1.0, 2.0"):
        assert not agree(fact, f"{fact.split(']')[0]}] {forged}")
        assert not agree(f"{fact.split(']')[0]}] {forged}", fact)
