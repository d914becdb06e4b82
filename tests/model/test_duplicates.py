"""One array object in two places of a model: the first step unties it, which is told of."""

import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._trainer.start import initial_state

from ..boring import BoringTasks, compilations
from ..helpers import tree_allclose

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
STRATEGY = em.MAML(em.losses.mse, em.InnerLoop(SGD, 1), SGD)
TANH = eqx.nn.Lambda(jnp.tanh)  # the same layer may stand anywhere: it has no arrays


def trainer():
    return em.Trainer(STRATEGY, meta_batch_size=2, summary=False)


def stacked(layer, other):
    return eqx.nn.Sequential([layer, TANH, other, TANH, eqx.nn.Linear(3, 1, key=KEY)])


def twice():
    layer = eqx.nn.Linear(3, 3, key=KEY)
    return stacked(layer, layer)


class Tied(eqx.Module):
    """`twice`, tied by Equinox's means."""

    shared: eqx.nn.Shared

    def __init__(self):
        layers = stacked(*(eqx.nn.Linear(3, 3, key=KEY) for _ in range(2)))
        self.shared = eqx.nn.Shared(layers, lambda m: m[2], lambda m: m[0])

    def __call__(self, x):
        return self.shared()(x)


@pytest.mark.parametrize("door", ["fit", "fit_seeds", "plan"])
def test_it_is_told_of_before_anything_is_compiled(door):
    run = {
        "fit": lambda: trainer().fit(twice(), BoringTasks(), 1),
        "fit_seeds": lambda: em.fit_seeds(trainer(), twice(), BoringTasks(), 1, seeds=2),
        "plan": lambda: trainer().plan(twice(), BoringTasks()),
    }[door]
    told = rf"`{door}\(model=\.\.\.\)` has one array in several places"
    places = r"model\.layers\[0\]\.weight = model\.layers\[2\]\.weight; .*\.bias = "
    with compilations() as compiled, pytest.raises(RuntimeWarning, match=told) as error:
        run()
    text = str(error.value)
    assert compiled == [] and "\nExpected: `eqx.nn.Shared`" in text
    assert re.search(rf"Received: {places}", text), text


def test_what_is_told_is_so():
    with pytest.warns(RuntimeWarning, match="unties"):
        untied = trainer().fit(twice(), BoringTasks(), 1).model
    assert not np.allclose(untied[0].weight, untied[2].weight)
    tied = trainer().fit(Tied(), BoringTasks(), 1).model.shared()
    assert tree_allclose(tied[0].weight, tied[2].weight, rtol=0, atol=0)


class Buffers(eqx.Module):
    """Arrays that are not learnt may be one; so may functions, and equal arrays are two."""

    layer: eqx.nn.Linear
    first: jax.Array
    second: jax.Array
    activations: tuple

    def __init__(self):
        self.layer = eqx.nn.Linear(3, 1, key=KEY)
        self.first = self.second = jnp.arange(3)
        self.activations = (jnp.tanh, jnp.tanh, TANH, TANH)

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "model",
    [Tied(), Buffers(), stacked(*(eqx.nn.Linear(3, 3, key=KEY) for _ in range(2)))],
    ids=["Shared", "buffers", "equal"],
)
def test_no_false_alarm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initial_state(STRATEGY, model, "fit(model=...)")
