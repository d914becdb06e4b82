"""What the outer optimizer is given: the gradient, the parameters, and the objective."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import BoringModel, Recorder, boring_fit, compilations
from ..helpers import tree_allclose

INNER = em.InnerLoop(optax.sgd(0.01), 1)


def fit(optimizer, algorithm=em.MAML, steps=4):
    """The state reached, and the metrics, each of all steps."""
    recorder, strategy = Recorder(), algorithm(em.losses.mse, INNER, optimizer)
    return boring_fit(steps, strategy=strategy, callbacks=[recorder]), recorder.metrics


def remembering():
    """Keeps the `value` that it was given last."""

    def update(grads, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: -0.01 * g, grads), value

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


@pytest.mark.parametrize(
    ("algorithm", "objective"),
    [(em.MAML, "loss"), (em.Joint, "pooled_loss"), (em.Reptile, "loss")],
)
def test_an_optimizer_that_wants_the_value_is_given_the_objective(algorithm, objective):
    state, metrics = fit(remembering(), algorithm)
    (value,) = jax.tree.leaves(state.opt_state)
    np.testing.assert_allclose(value, metrics[objective][-1], rtol=1e-6)


def test_a_plateau_reduces_the_rate_as_in_optax():
    """Optax by itself, given the losses of the run."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
    state, metrics = fit(optax.chain(optax.sgd(1e-3), plateau))
    expected = plateau.init({})
    for loss in metrics["loss"]:
        _, expected = plateau.update({}, expected, value=loss)
    assert tree_allclose(state.opt_state[1], expected)
    assert float(expected.scale) < 1


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), id="takes no value"),
        pytest.param(
            optax.MultiSteps(
                optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), 2
            ).gradient_transformation(),
            id="hands it on",
        ),
    ],
)
def test_optimizers_that_step_now_and_then(optimizer):
    """Both move the parameters at every other step."""
    (odd, _), (even, _) = fit(optimizer, steps=3), fit(optimizer, steps=2)
    assert np.all(np.isfinite(even.model.weight))
    assert not tree_allclose(even.model, BoringModel())
    assert jax.tree.structure(odd) == jax.tree.structure(even)


@pytest.mark.parametrize(
    "optimizer", [optax.lbfgs(), optax.chain(optax.scale_by_backtracking_linesearch(3))]
)
def test_a_line_search_is_refused_before_anything_is_compiled(optimizer):
    with compilations() as compiled, pytest.raises(TypeError, match="outer `optimizer`") as error:
        fit(optimizer)
    assert "\nReceived: " in str(error.value) and "no line search" in str(error.value)
    assert compiled == []


def test_what_makes_an_optimizer_says_how(as_users_run_it):
    with pytest.raises(TypeError, match=r"Expected: .*its `\.gradient_transformation\(\)`"):
        fit(optax.MultiSteps(optax.sgd(0.1), 2))
