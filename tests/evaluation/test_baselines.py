"""Evaluations without an interval, and of models that have nothing to learn."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Evaluate, TensorBoard

from ..boring import BoringModel, BoringTasks, boring_fit

SGD = optax.sgd(0.1)
MAML = em.MAML(em.losses.mse, em.InnerLoop(SGD, 2), SGD)
KEY = jax.random.key(0)


class Zero(eqx.Module):
    """Predicts zero."""

    def __call__(self, x):
        return jnp.zeros(1)


@pytest.mark.parametrize("model", [Zero(), lambda x: jnp.zeros(1)], ids=["module", "function"])
def test_a_model_without_parameters_is_a_baseline(model):
    """Whatever adapts it, it stays the mean square of the targets."""
    result = em.evaluate(MAML, model, BoringTasks(), num_tasks=3)
    assert result.values["loss"].shape == (3, 3)
    np.testing.assert_array_equal(result.values["loss"][:, 0], result.values["loss"][:, 2])
    tasks = jax.vmap(BoringTasks().sample)(jax.random.split(KEY, 3))
    expected = np.mean(np.asarray(tasks.query[1]) ** 2, axis=(1, 2))
    values = em.evaluate(MAML, model, tasks).values["loss"]
    np.testing.assert_allclose(values, np.tile(expected[:, None], 3), rtol=1e-6)


def test_raw_pixels_under_prototypes():
    """Two classes that are points: every query is at its own."""
    images = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
    tasks = em.tasks.Episodes(images, np.repeat([0, 1], 4), ways=2, shots=1, queries=1)
    strategy = em.ProtoNet(em.losses.cross_entropy, SGD)
    result = em.evaluate(strategy, eqx.nn.Identity(), tasks, num_tasks=4)
    np.testing.assert_array_equal(result.values["accuracy"][:, 1], 1)


@pytest.mark.usefixtures("as_users_run_it")
def test_parameters_that_are_hidden_are_still_refused():
    hidden = jax.vmap(eqx.nn.Linear(3, 1, key=KEY))
    with pytest.raises(ValueError, match=r"no parameters(?s:.*)no batch axis"):
        em.evaluate(MAML, hidden, BoringTasks(), num_tasks=2)
    for nothing in (None, (), 3):
        with pytest.raises(ValueError, match="no parameters"):
            em.evaluate(MAML, nothing, BoringTasks(), num_tasks=2)
    with pytest.raises(ValueError, match="no parameters"):
        boring_fit(1, strategy=MAML, model=Zero())


def test_of_one_task_there_is_a_mean_and_no_interval():
    alone = em.evaluate(MAML, BoringModel(), BoringTasks(), num_tasks=1)
    among = em.evaluate(MAML, BoringModel(), BoringTasks(), num_tasks=2)
    assert alone.values["loss"].shape == (1, 3)
    np.testing.assert_allclose(alone.mean(), among.values["loss"][0], rtol=1e-6)
    assert alone.ci95().shape == (3,) and np.all(np.isnan(alone.ci95()))
    assert repr(alone).startswith("Evaluation(1 task, after adaptation: loss=")
    assert "nan" not in repr(alone) and "±" not in repr(alone) and "±" in repr(among)
    batch = jax.tree.map(lambda x: x[None], BoringTasks().sample(KEY))
    assert em.evaluate(MAML, BoringModel(), batch).values["loss"].shape == (1, 3)


def test_a_run_that_is_evaluated_on_one_task(tmp_path):
    evaluate = Evaluate(BoringTasks(), every=2, num_tasks=1)
    logs = [JSONL(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "board")]
    boring_fit(2, strategy=MAML, callbacks=[evaluate, *logs])
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert line["eval/loss"]["ci95"] == ["NaN"] * 3
    np.testing.assert_allclose(line["eval/loss"]["mean"], evaluate.result.mean())
