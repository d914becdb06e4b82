"""`Trainer.plan`: what an outer step costs in every variant, before it is run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._preflight import plan as _plan

from ..boring import BoringModel, BoringStrategy, BoringTasks
from ..helpers import tiny_mlp


@pytest.fixture(scope="module")
def plan():
    inner = em.InnerLoop(optax.sgd(0.01), 16, "reverse")
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3), task_chunk=None)
    model = eqx.nn.MLP(1, 1, 128, 2, activation=jnp.tanh, key=jax.random.key(0))
    return em.Trainer(strategy, meta_batch_size=8).plan(model, em.tasks.Sinusoid(512, 64))


def find(plan, **wanted):
    rows = [r for r in plan.rows[1:] if all(getattr(r, k) == v for k, v in wanted.items())]
    assert len(rows) == 1
    return rows[0]


@pytest.mark.slow
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
    # The matrix products of a forward pass take 2 (128 + 128^2 + 128) operations an example. A
    # gradient is three of them, its derivative along a direction twice that: nine an inner step in
    # mixed mode. What is done element by element comes on top.
    forward = 2 * (128 + 128**2 + 128)
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
    # Whoever chose reverse mode may have had to.
    assert (plan.rows[0].gradient, plan.recommended.gradient) == ("reverse", "mixed")
    assert "check_meta_gradient" in plan.reason
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.adam(1e-3))
    trainer = em.Trainer(strategy, meta_batch_size=2)
    small = trainer.plan(tiny_mlp(), em.tasks.Sinusoid(2, 2))
    assert small.recommended is small.rows[0]
    # Of one inner step both modes are the same program, and "auto" is all tasks of this size.
    assert [(r.gradient, r.task_chunk) for r in small.rows] == [("mixed", "auto"), ("mixed", 1)]
    assert "as it is" in str(small)


@pytest.mark.parametrize("cls", [em.Joint, em.Reptile])
def test_what_the_outer_step_does_not_differentiate_has_no_other_mode(cls):
    strategy = cls(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 5), optax.adam(1e-3))
    plan = em.Trainer(strategy, meta_batch_size=2).plan(tiny_mlp(), em.tasks.Sinusoid(2, 2))
    knobs = [(r.gradient, r.remat, r.task_chunk) for r in plan.rows]
    modes = ("first_order", False) if cls is em.Joint else (None, None)
    assert knobs == [(*modes, "auto"), (*modes, 1)]


@jax.custom_vjp
def reverse_only(x):
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (reverse_only(x), x), lambda x, g: (g * jnp.cos(x),))


def loss_of_reverse_mode(model, batch, key):
    x, y = batch
    return jnp.mean((reverse_only(em.losses.predict(model, x)) - y) ** 2), {}


class Phase(eqx.Module):
    angle: jax.Array

    def __call__(self, x):
        return jnp.real(x * self.angle)


@pytest.mark.parametrize(
    ("loss", "model"),
    [(loss_of_reverse_mode, tiny_mlp()), (em.losses.mse, Phase(jnp.array([1j])))],
)
def test_where_mixed_mode_cannot_be_used_it_has_no_row(loss, model):
    def plan(gradient):
        strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.01), 2, gradient), optax.adam(1e-3))
        return em.Trainer(strategy, meta_batch_size=2).plan(model, em.tasks.Sinusoid(2, 2))

    assert {row.gradient for row in plan("reverse").rows} == {"reverse"}
    with pytest.raises(TypeError, match="gradient='mixed'"):
        plan("mixed")


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(_plan, "_LIMITS", tuple(str(tmp_path / name) for name in "abc"))
    machine = _plan._memory()
    (tmp_path / "a").write_text("max\n")
    (tmp_path / "b").write_text(f"{2**63 - 4096}\n")  # version 1 without a limit
    assert _plan._memory() == machine
    (tmp_path / "c").write_text(f"{2**20}\n")
    assert _plan._memory() == 2**20


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
    nan = eqx.tree_at(lambda m: m.bias, BoringModel(), jnp.full(1, jnp.nan))
    with pytest.raises(ValueError, match=r"`plan\(model=\.\.\.\)` has NaN among"):
        trainer.plan(nan, BoringTasks())
    for nothing in (object(), BoringTasks):
        with pytest.raises(TypeError, match=r"`plan\(tasks=\.\.\.\)` is not a task source"):
            trainer.plan(BoringModel(), nothing)
