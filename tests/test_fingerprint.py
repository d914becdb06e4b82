"""By what a resumed run knows its own, beyond the shapes of its arrays."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._fingerprint import fingerprint
from eqxmeta.callbacks import Checkpoint

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize(
    ("model", "tasks", "named"),
    [
        (Scaled(rate=0.2), _episodes(), r"model\.dropout\.p=0\.1.*model\.dropout\.p=0\.2"),
        (Scaled(scale=2.0), _episodes(), r"model\.scale=1\.0.*model\.scale=2\.0"),
        (Scaled(activation=jnp.tanh), _episodes(), r"model\.activation=relu.*activation=tanh"),
        (Scaled(), _episodes(first=1.0), r"tasks\.images=float32\[12, 4\] \w+.*tasks\.images="),
        (Scaled(), _episodes(augment=[jax.jit(crop)]), r"tasks\.augment\[1\]=partial.*=nothing"),
        (Scaled(), _episodes(queries=3), r"tasks\.queries=2.*tasks\.queries=3"),
    ],
)
def test_a_model_or_tasks_with_the_same_arrays_but_other_parts(tmp_path, model, tasks, named):
    _fit_scaled(tmp_path, Scaled(), _episodes(), 2)
    with pytest.raises(em.CheckpointMismatch, match=f"(?s)is of another run.*{named}"):
        _fit_scaled(tmp_path, model, tasks, 4)
    assert int(_fit_scaled(tmp_path, Scaled(), _episodes(), 4).step) == 4


def test_functions_are_known_again_in_another_process(tmp_path):
    # What a jitted function, a bound method or an object prints of itself is where in memory it is.
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from tests import test_fingerprint as t
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


def test_a_fingerprint_reads_the_same_whatever_the_order_of_a_set():
    found = fingerprint({"names": frozenset("abcdefgh"), "many": list(range(99))}, values=True)
    assert found["['names']"] == "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}"
    assert list(found) == ["", "['names']", "['many']", "['many'][...]"]
