"""Programs live as long as the strategies that they were compiled for."""

import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Evaluate

from ..boring import BoringStrategy, BoringTasks, boring_fit, compilations

INNER = em.InnerLoop(optax.sgd(0.1), 1)


def _fit(optimizer, loss=em.losses.mse, **options):
    strategy = em.Joint(loss, INNER, optimizer)
    return strategy, boring_fit(3, strategy=strategy, **options)


def _live_programs():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def test_the_programs_of_a_sweep_are_released_with_their_strategies():
    def run(rate):
        evaluate = Evaluate(BoringTasks(), every=3, num_tasks=2)
        _fit(optax.sgd(rate), callbacks=[evaluate])

    run(0.1)  # and what all share is compiled
    before = _live_programs()
    for rate in (0.2, 0.3):
        with compilations() as training, compilations("measure_piece") as evaluation:
            run(rate)
        assert len(training) == len(evaluation) == 1
    assert _live_programs() == before


def test_a_program_stays_while_its_strategy_is_there():
    optimizer = optax.sgd(0.5)
    strategy, _ = _fit(optimizer)
    with compilations() as compiled:
        _fit(optimizer)  # an equal strategy
        boring_fit(5, strategy=strategy)
    assert compiled == []
    with compilations() as compiled:
        _fit(optax.sgd(0.5))
    assert len(compiled) == 1


def test_strategies_that_differ_do_not_share():
    state = boring_fit(3, strategy=BoringStrategy(noise=0.0))
    other = boring_fit(3, strategy=BoringStrategy(noise=0.5))
    assert not jnp.array_equal(state.model.weight, other.model.weight)


def test_the_users_own_check_inside_a_program_says_what_it_says():
    def loss(model, batch, key):
        value, metrics = em.losses.mse(model, batch, key)
        return eqx.error_if(value, value > 0, "the loss is positive"), metrics

    with pytest.raises(eqx.EquinoxRuntimeError, match=r"^the loss is positive$"):
        _fit(optax.sgd(0.1), loss)
