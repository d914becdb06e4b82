"""What holds a model and more, such as what Meta-SGD learns, is told from a model at every door."""

import re

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import compilations
from ..helpers import tiny_mlp, tree_allclose

pytestmark = pytest.mark.usefixtures("as_users_run_it")

TASKS = em.tasks.Sinusoid(2, 3)
TASK = TASKS.sample(jax.random.key(0))
INNER, SGD = em.InnerLoop(optax.sgd(0.01), 1), optax.sgd(0.1)
LEARNT, PLAIN = em.MetaSGD(em.losses.mse, INNER, SGD), em.MAML(em.losses.mse, INNER, SGD)
STATE = LEARNT.init(tiny_mlp())
HELD = STATE.model
X = TASK.support[0]


def trainer(strategy):
    return em.Trainer(strategy, meta_batch_size=2, summary=False)


class Own(eqx.Module):
    """A user's own, beside whose model something else is learnt."""

    model: eqx.Module
    more: jax.Array


OWN = Own(tiny_mlp(), jax.numpy.ones(2))
A_DOOR = r"`{}\(model=\.\.\.\)` is not a model.*\nReceived: a `MetaParameters`.*\nExpected: .*"
A_DOOR += r"`state\.model\.model`"
A_CALL = r"A `{}` is not a model: it holds one.*\nReceived: .*\nExpected: .*`\.model` of the `{}`"

# fmt: off
DOORS = {
    "fit": (lambda: trainer(LEARNT).fit(HELD, TASKS, 2), A_DOOR.format("fit")),
    "fit of another": (lambda: trainer(PLAIN).fit(HELD, TASKS, 2), A_DOOR.format("fit")),
    "plan": (lambda: trainer(PLAIN).plan(HELD, TASKS), A_DOOR.format("plan")),
    "fit_seeds": (lambda: em.fit_seeds(trainer(PLAIN), HELD, TASKS, 2, seeds=2),
                  A_DOOR.format("fit_seeds")),
    "evaluate": (lambda: em.evaluate(PLAIN, HELD, TASKS), A_CALL),
    "check_meta_gradient": (lambda: em.check_meta_gradient(PLAIN, HELD, TASK),
                            A_CALL),
    "a call": (lambda: HELD(X[0]), A_CALL),
    "a call under vmap": (lambda: jax.vmap(HELD)(X), A_CALL),
    "inner_adapt": (lambda: PLAIN.inner_adapt(HELD, TASK.support), A_CALL),
    "outer_update": (lambda: PLAIN.outer_update(
        em.TrainState(STATE.step, HELD, PLAIN.init(HELD).opt_state),
        jax.tree.map(lambda x: x[None], TASK), key=None), A_CALL),
    "predict": (lambda: em.losses.predict(HELD, X), A_CALL),
    "a loss": (lambda: em.losses.mse(HELD, TASK.support, None), A_CALL),
    "a head": (lambda: em.ANIL(em.losses.mse, INNER, SGD).inner_adapt(HELD, TASK.support), A_CALL),
    "a figure": (lambda: em.plot_adaptation({"": (PLAIN, HELD)}, TASKS), A_CALL),
    "a state": (lambda: STATE(X[0]), A_CALL.replace("{}", "TrainState")),
    "a state is adapted": (lambda: PLAIN.inner_adapt(STATE, TASK.support),
                           A_CALL.replace("{}", "TrainState")),
    "an adaptation": (lambda: INNER(em.losses.mse, tiny_mlp(), TASK.support)(X[0]),
                      A_CALL.replace("{}", "Adaptation")),
    "a user's own": (lambda: PLAIN.inner_adapt(OWN, TASK.support), A_CALL.replace("{}", "Own")),
}
# fmt: on


@pytest.mark.parametrize(("door", "told"), DOORS.values(), ids=DOORS)
def test_it_is_refused_with_the_call_that_is_meant(door, told):
    with compilations("train") as compiled, pytest.raises(TypeError) as error:
        door()
    assert re.search(told.replace("{}", "MetaParameters"), str(error.value)), str(error.value)
    assert len(str(error.value)) < 400  # not a print of all its arrays
    assert compiled == []


def test_what_is_meant_works():
    adapted = LEARNT.inner_adapt(HELD, TASK.support)
    assert np.all(np.isfinite(adapted(X[0])))
    assert tree_allclose(HELD.model(X[0]), tiny_mlp()(X[0]))
    ours = em.evaluate(LEARNT, HELD, TASKS, num_tasks=3)
    # Rates of one: as MAML.
    theirs = em.evaluate(PLAIN, HELD.model, TASKS, num_tasks=3)
    assert tree_allclose(ours.values["loss"], theirs.values["loss"])


def test_fast_converts_the_rates_too(tmp_path):
    model = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))
    held = em.nn.fast(LEARNT.init(model).model)
    assert isinstance(held.model.layers[0], em.nn.Linear)
    ours = LEARNT.inner_adapt(held, TASK.support)
    theirs = LEARNT.inner_adapt(LEARNT.init(model).model, TASK.support)
    np.testing.assert_allclose(ours(X[0]), theirs(X[0]), rtol=1e-5)


def test_it_is_saved_and_loaded_whole_or_for_its_model(tmp_path):
    em.save(tmp_path / "held", HELD)
    assert tree_allclose(em.load(tmp_path / "held", HELD), HELD)
    assert tree_allclose(em.load_model(tmp_path / "held", tiny_mlp()), HELD.model)
