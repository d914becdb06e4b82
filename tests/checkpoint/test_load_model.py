"""Models that had adapted when they were saved: into what they are loaded."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..helpers import tree_allclose


class Normed(eqx.Module):
    """Two layers that keep statistics, one of them in a list: `[3] -> [2]`."""

    layers: list
    first: em.nn.SupportNorm

    def __init__(self, seed=0):
        key = jax.random.key(seed)
        self.first = em.nn.SupportNorm(3)
        self.layers = [eqx.nn.Linear(3, 2, key=key), em.nn.SupportNorm(2)]

    def __call__(self, x):
        for layer in (self.first, *self.layers):
            x = layer(x)
        return x


LOSS = em.losses.cross_entropy
MAML = em.MAML(LOSS, em.InnerLoop(optax.sgd(0.1), 1), optax.adam(1e-3))
X = jax.random.normal(jax.random.key(3), (6, 3))
SUPPORT = (X, jnp.arange(6) % 2)


def same(x, y):
    return tree_allclose(x, y, rtol=0, atol=0)


@pytest.fixture(scope="module")
def adapted():
    return MAML.inner_adapt(Normed(), SUPPORT)


def test_the_error_names_the_call_and_the_call_does_it(tmp_path, adapted):
    em.save(tmp_path / "adapted", adapted)
    fresh = Normed(seed=1)
    with pytest.raises(
        em.CheckpointMismatch, match=r"(?s)first\.statistics\[0\].*Expected"
    ) as error:
        em.load(tmp_path / "adapted", fresh)
    (call,) = re.findall(r"`(eqxmeta\.load_model\(.*\))`", str(error.value))
    loaded = eval(call, {"eqxmeta": em, "like": fresh})
    assert same(loaded, adapted)
    assert np.array_equal(jax.vmap(loaded)(X), jax.vmap(adapted)(X))


@pytest.mark.parametrize(
    "like",
    [
        lambda adapted: Normed(seed=1),
        lambda adapted: adapted,
        lambda adapted: MAML.inner_adapt(Normed(2), SUPPORT),
        lambda adapted: eqx.filter_eval_shape(Normed),
    ],
)
def test_it_is_loaded_into_a_model_with_statistics_or_without(tmp_path, adapted, like):
    em.save(tmp_path / "x", adapted)
    assert same(em.load_model(tmp_path / "x", like(adapted)), adapted)
    assert same(em.load(tmp_path / "x", adapted), adapted)


def test_what_had_not_adapted_has_no_statistics_whatever_it_is_loaded_into(tmp_path, adapted):
    em.save(tmp_path / "alone", Normed())
    em.save(tmp_path / "run", MAML.init(Normed()))
    for name in ("alone", "run"):
        assert same(em.load_model(tmp_path / name, adapted), Normed())
        assert same(em.load_model(tmp_path / name, Normed(1)), Normed())


def test_statistics_of_some_layers_only(tmp_path, adapted):
    partly = eqx.tree_at(lambda m: m.layers[1].statistics, adapted, None)
    em.save(tmp_path / "x", partly)
    assert same(em.load_model(tmp_path / "x", Normed(1)), partly)


@pytest.mark.parametrize("kind", [em.FOMAML, em.ANIL, em.BOIL, em.MetaSGD, em.Reptile, em.Joint])
def test_adapted_by_any_strategy(tmp_path, kind):
    strategy = kind(LOSS, em.InnerLoop(optax.sgd(0.1), 1), optax.adam(1e-3))
    adapted = strategy.inner_adapt(strategy.init(Normed()).model, SUPPORT)
    em.save(tmp_path / "x", adapted)
    assert same(em.load_model(tmp_path / "x", Normed(1)), adapted)


def test_a_classifier_of_prototypes_is_loaded_into_another(tmp_path):
    strategy = em.ProtoNet(LOSS, optax.adam(1e-3))
    adapted = strategy.inner_adapt(Normed(), SUPPORT)
    em.save(tmp_path / "x", adapted)
    for load in (em.load, em.load_model):
        with pytest.raises(em.CheckpointMismatch, match="`inner_adapt` returned"):
            load(tmp_path / "x", Normed(1))
        other = strategy.inner_adapt(Normed(1), (X + 1, SUPPORT[1]))
        assert same(load(tmp_path / "x", other), adapted)


def test_a_checkpoint_of_a_run_where_a_model_is_meant(tmp_path):
    em.save(tmp_path / "run", MAML.init(Normed()))
    with pytest.raises(em.CheckpointMismatch, match=r"eqxmeta\.load_model\('.*run', like\)"):
        em.load(tmp_path / "run", Normed(1))


def test_another_model_is_not_said_to_be_in_it(tmp_path, adapted):
    class Other(eqx.Module):
        first: em.nn.SupportNorm

    em.save(tmp_path / "x", adapted)
    for load in (em.load, em.load_model):
        with pytest.raises(em.CheckpointMismatch) as error:
            load(tmp_path / "x", Other(em.nn.SupportNorm(3)))
        assert "load_model" not in str(error.value)
        assert "only in the file: .layers[0].weight float32[2, 3]" in str(error.value)
