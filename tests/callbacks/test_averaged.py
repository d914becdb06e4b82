"""Averages of the weights: measured, monitored, saved, and taken out of the file."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Evaluate, Lambda

from ..boring import BoringModel, BoringTasks, boring_fit

SCHEDULE_FREE = optax.contrib.schedule_free_sgd(0.05)


def params_ema(decay):
    """As `docs/judging.md` has it."""

    def update(updates, ema, params):
        new = optax.apply_updates(params, updates)
        return updates, optax.incremental_update(new, ema, 1 - decay)

    return optax.GradientTransformation(lambda params: params, update)


def strategy(optimizer):
    return em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optimizer)


def test_what_is_measured_is_the_average_and_load_model_has_it(tmp_path):
    learner = strategy(optax.chain(optax.sgd(0.05), params_ema(0.75)))
    weights, read = [], []

    def averaged(state):
        return em.partition_learnt(learner, state.opt_state[-1])[0]

    callbacks = [
        Lambda(every=1, on_step_end=lambda run: weights.append(np.array(run.state.model.weight))),
        Lambda(name="r", on_log=lambda run, x: read.append(float(x["eval/loss"].mean[-1]))),
        Evaluate(BoringTasks(), every=4, num_tasks=5, model=averaged),
        Checkpoint(tmp_path, every=4, monitor="eval/loss", model=averaged),
    ]
    boring_fit(8, strategy=learner, callbacks=callbacks)
    ema, expected = np.zeros(3), []
    for step, weight in enumerate(weights, 1):
        ema = 0.75 * ema + 0.25 * weight
        if step % 4 == 0:
            model = em.load_model(tmp_path / f"step-{step:09}.ckpt", BoringModel())
            np.testing.assert_allclose(model.weight, ema, rtol=1e-5)
            expected.append(em.evaluate(learner, model, BoringTasks(), num_tasks=5).mean()[-1])
    assert np.abs(weights[-1] - ema).max() > 1e-3
    np.testing.assert_allclose(read, expected, rtol=1e-5)
    best = em.load_best(tmp_path, learner, BoringModel())
    np.testing.assert_array_equal(best.model.weight, weights[int(best.step) - 1])


def test_schedule_free():
    learner = strategy(SCHEDULE_FREE)

    def averaged(state):
        params, _ = em.partition_learnt(learner, state.model)
        return optax.contrib.schedule_free_eval_params(state.opt_state, params)

    evaluate = Evaluate(BoringTasks(), every=4, num_tasks=5, model=averaged)
    state = boring_fit(4, strategy=learner, callbacks=[evaluate])
    # x = (y - (1 - b1) z) / b1, of Defazio et al. 2024, equation (1).
    y, z, b1 = state.model.weight, state.opt_state.z.weight, state.opt_state.b1
    x = averaged(state).weight
    np.testing.assert_allclose(x, (y - (1 - b1) * z) / b1, rtol=1e-4)
    by_hand = em.evaluate(learner, averaged(state), BoringTasks(), num_tasks=5)
    np.testing.assert_allclose(evaluate.result.mean(), by_hand.mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", [Evaluate, Checkpoint])
def test_a_function_that_fails_is_named_before_the_first_step(tmp_path, kind):
    where = BoringTasks() if kind is Evaluate else tmp_path
    with pytest.raises(Exception, match="model"):
        kind(where, every=2, model=jnp.ones(3))
    with pytest.raises(AttributeError) as caught:
        boring_fit(2, callbacks=[kind(where, every=2, model=lambda state: state.ema)])
    assert f"`{kind.__name__}(model=...)`" in "".join(caught.value.__notes__)
