"""`Trainer.plan`: what an outer step costs in every variant, before it is run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from .boring import BoringModel, BoringStrategy, BoringTasks
from .helpers import tiny_mlp


@pytest.fixture(scope="module")
def plan():
    inner = em.InnerLoop(optax.sgd(0.01), 16, "reverse")
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3), task_chunk=None)
    model = eqx.nn.MLP(1, 1, 128, 3, activation=jnp.tanh, key=jax.random.key(0))
    return em.Trainer(strategy, meta_batch_size=8).plan(model, em.tasks.Sinusoid(512, 64))


def find(plan, **wanted):
    rows = [r for r in plan.rows[1:] if all(getattr(r, k) == v for k, v in wanted.items())]
    assert len(rows) == 1
    return rows[0]


def test_the_first_row_is_the_strategy_as_it_is_and_the_others_change_one_knob(plan):
    now = plan.rows[0]
    assert (now.gradient, now.remat, now.task_chunk) == ("reverse", False, None)
    assert len(plan.rows) == 5
    for row in plan.rows[1:]:
        changed = [getattr(row, k) != getattr(now, k) for k in ("gradient", "remat", "task_chunk")]
        assert sum(changed) == 1


def test_memory_is_what_the_compiled_step_says(plan):
    # Reverse mode keeps the activations of 16 steps, remat those of 4, a chunk those of one task.
    now = plan.rows[0].temp_bytes
    assert find(plan, gradient="mixed").temp_bytes < now / 3
    assert find(plan, remat=True).temp_bytes < now / 2
    assert find(plan, task_chunk=1).temp_bytes < now / 6
    assert find(plan, task_chunk=1).temp_bytes < find(plan, task_chunk=2).temp_bytes < now / 3


def test_operations_count_every_inner_step(plan):
    # The matrix products of a forward pass take 2 (128 + 2 * 128^2 + 128) operations an example. A
    # gradient is three of them, its derivative along a direction twice that: nine an inner step in
    # mixed mode. What is done element by element comes on top.
    forward = 2 * (128 + 2 * 128**2 + 128)
    products = 8 * forward * (16 * 9 * 512 + (3 + 1) * 64)
    mixed = find(plan, gradient="mixed").flops
    assert 1 < mixed / products < 1.4
    assert plan.rows[0].flops < mixed
    assert find(plan, remat=True).flops > plan.rows[0].flops
    assert find(plan, task_chunk=1).flops == pytest.approx(plan.rows[0].flops, rel=0.01)


def test_it_recommends_another_way_only_where_that_matters(plan):
    assert plan.recommended is not plan.rows[0]
    assert plan.recommended.temp_bytes < plan.rows[0].temp_bytes / 2
    assert "times less memory" in str(plan)
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.adam(1e-3))
    trainer = em.Trainer(strategy, meta_batch_size=2)
    small = trainer.plan(tiny_mlp(), em.tasks.Sinusoid(2, 2))
    assert small.recommended is small.rows[0]
    assert "as it is" in str(small)


def test_a_strategy_without_knobs_has_one_row_and_a_host_source_will_do():
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2)
    plan = trainer.plan(BoringModel(), BoringTasks())
    assert len(plan.rows) == 1
    assert "all" in str(plan)
    x = np.zeros((2, 3, 1), np.float32)
    host = [em.Task((x, x), (x, x))]
    strategy = em.FOMAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.adam(1e-3))
    plan = em.Trainer(strategy, meta_batch_size=2).plan(tiny_mlp(), host)
    assert {row.gradient for row in plan.rows} == {"first_order"}


def test_fast_dev_run_prints_it(capsys):
    em.Trainer(BoringStrategy(), meta_batch_size=2, fast_dev_run=True).fit(
        BoringModel(), BoringTasks(), 10
    )
    out = capsys.readouterr().out
    assert "task_chunk" in out and "trainer.plan(model, tasks)" in out


def test_fast_dev_run_compiles_no_alternatives(capsys):
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.adam(1e-3))
    trainer = em.Trainer(strategy, meta_batch_size=2, fast_dev_run=1)
    trainer.fit(tiny_mlp(), em.tasks.Sinusoid(2, 2), 10)
    out = capsys.readouterr().out
    assert "* mixed" in out and "reverse" not in out


def test_what_is_wrong_is_told_before_anything_is_compiled():
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2)
    with pytest.raises(TypeError, match=r"`plan\(model=\.\.\.\)` is not a model"):
        trainer.plan(BoringModel, BoringTasks())
    with pytest.raises(TypeError, match="is not a task source"):
        trainer.plan(BoringModel(), object())
