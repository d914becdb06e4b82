"""`summary`: the table of layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tiny_mlp

LOSS, INNER, ADAM = em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.adam(1e-3)


def rows(model, strategy, example):
    return {x.path: x for x in em.summary(model, strategy, example).layers}


def test_conv4_by_hand():
    """Width 8, 28x28: four convolutions of 3x3 with a pool of 2 each, and a head from 8 to 5."""
    model = em.nn.Conv4(1, ways=5, width=8, key=jax.random.key(0))
    found = rows(model, em.ANIL(LOSS, INNER, ADAM, head=lambda m: m.head), jnp.zeros((1, 28, 28)))
    convolutions = [x for x in found.values() if x.kind == "Conv2d"]
    assert [x.parameters for x in convolutions] == [1 * 9 * 8 + 8] + [8 * 9 * 8 + 8] * 3
    assert [x.shape for x in convolutions] == [(8, 28, 28), (8, 14, 14), (8, 7, 7), (8, 3, 3)]
    head = found["head"]
    assert (head.shape, head.parameters, head.adapts, head.learnt) == ((5,), 45, 45, 45)
    assert all(x.adapts == 0 and x.learnt == x.parameters for x in convolutions)
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert sum(x.parameters for x in found.values()) == sum(x.size for x in arrays)


def test_what_is_learnt_and_what_is_learnt_besides():
    strategy = em.MetaSGD(em.losses.mse, INNER, ADAM, learn=lambda m: m.out.weight)
    table = em.summary(tiny_mlp(), strategy, np.zeros(1, np.float32))
    hidden, out, extra = table.layers
    assert (hidden.path, hidden.kind, hidden.shape) == ("hidden", "Linear", (8,))
    assert (hidden.parameters, hidden.adapts, hidden.learnt) == (16, 16, 0)
    assert (out.shape, out.parameters, out.adapts, out.learnt) == ((1,), 9, 9, 8)
    assert (extra.path, extra.parameters, extra.learnt) == ("(extra)", 25, 25)
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "class", "output", "parameters", "adapts", "learnt"]
    assert lines[2].split() == ["hidden", "Linear", "[8]", "16", "yes", "no"]
    assert lines[3].split() == ["out", "Linear", "[1]", "9", "yes", "8"]
    assert lines[-1] == "50 parameters: 25 adapt, 33 are learnt."


def test_without_inner_steps_nothing_adapts_and_norms_have_their_support():
    model = em.nn.Conv4(3, ways=None, width=4, key=jax.random.key(0))
    found = rows(model, em.ProtoNet(LOSS, ADAM), jnp.zeros((3, 28, 28)))
    assert not any(x.adapts for x in found.values())
    norms = [x for x in found.values() if "Norm" in x.kind]
    assert len(norms) == 4 and all(x.parameters == 8 for x in norms)


def test_what_the_model_says_of_a_wrong_example_is_told():
    with pytest.raises(TypeError) as caught:
        em.summary(tiny_mlp(), em.MAML(em.losses.mse, INNER, ADAM), jnp.zeros(3))
    assert "`summary(example=...)`" in "".join(caught.value.__notes__)
