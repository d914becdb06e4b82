"""Metrics of any number are few arrays on the device, and each under its name everywhere else."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._loop.chunk import Job, train_chunk
from eqxmeta._strategy.metrics import columns
from eqxmeta._task.device_source import Sampled
from eqxmeta.callbacks import JSONL

from ..boring import Recorder, boring_fit, same_bits
from ..helpers import tiny_mlp

TASKS = em.tasks.Sinusoid(2, 2)
STEPS = 12  # inner steps: "support_loss/10" comes before "support_loss/2"


class Extended(em.FOMAML):
    """A user's own metrics beside the library's, one of which is spoilt at outer step `bad`."""

    bad: int = -1

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        new, metrics = super().outer_update(state, tasks, key=key)
        metrics |= {"index": state.step, "even": state.step % 2 == 0}
        spoilt = jnp.where(new.step == self.bad, jnp.inf, metrics["support_loss/11"])
        return new, metrics | {"support_loss/11": spoilt}


def extended(**options):
    inner = em.InnerLoop(optax.sgd(0.01), STEPS)
    return Extended(em.losses.mse, inner, optax.adam(1e-3), **options)


def test_columns_come_out_as_they_were():
    rng = np.random.default_rng(0)
    scalars = {f"x/{i}": rng.normal(size=5).astype(np.float32) for i in range(23)}
    scalars |= {
        "loss": rng.normal(size=5).astype(jnp.bfloat16),
        "count": np.arange(5, dtype=np.int32),
        "flag": np.array([True, False, True, True, False]),
        "a": np.full(5, np.nan, np.float32),
        # Neither is of the series, nor are they one.
        "x": np.arange(5, dtype=np.float32),
        "x/7/y": np.arange(5, dtype=np.float32),
        "x/30": np.arange(5, dtype=np.int32),
    }
    kept = jax.jit(jax.vmap(columns))(scalars)
    assert [x.shape for x in kept.arrays] == [(5, len(names)) for names in kept.names]
    assert [f"x/{i}" for i in range(23)] in map(list, kept.names)
    assert len(kept.arrays) == 8
    rows = jax.device_get(kept).rows(5)
    assert list(rows) == sorted(scalars)
    assert same_bits(rows, scalars)
    first = jax.device_get(kept).rows(2)
    assert same_bits(first, {name: values[:2] for name, values in scalars.items()})
    assert columns({}).rows(0) == {}


def test_every_metric_has_its_name_wherever_it_is_seen(tmp_path):
    recorder, log = Recorder(), JSONL(tmp_path / "log.jsonl")
    strategy = extended()
    options = {"strategy": strategy, "model": tiny_mlp(), "tasks": TASKS}
    boring_fit(3, callbacks=[recorder, log], steps_per_execution=2, **options)
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]

    state, expected = strategy.init(tiny_mlp()), []
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(0), step)
        tasks = jax.vmap(TASKS.sample)(jax.random.split(key, 2))
        key = jax.random.fold_in(key, 0x75706474)
        state, metrics = strategy.outer_update(state, tasks, key=key)
        assert type(metrics) is dict and all(x.shape == () for x in metrics.values())
        expected.append({"step": np.int32(step + 1), **metrics})

    assert {f"support_loss/{i}" for i in range(STEPS)} < expected[0].keys()
    assert [list(row) for row in rows] == [["step", *sorted(expected[0].keys() - {"step"})]] * 3
    assert list(recorder.rows[0]) == list(rows[0])
    for step, wanted in enumerate(expected):
        for name, value in wanted.items():
            seen = recorder.metrics[name][step]
            assert seen.dtype == value.dtype or name == "step"
            np.testing.assert_allclose(seen, value, rtol=1e-5, err_msg=name)
            assert seen == rows[step][name]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_one_of_many_that_is_not_finite_is_named(policy):
    recorder = Recorder()
    options = {"model": tiny_mlp(), "tasks": TASKS, "callbacks": [recorder]}
    if policy == "skip":
        with pytest.warns(RuntimeWarning, match="skipped 1 steps"):
            boring_fit(5, strategy=extended(bad=3), on_non_finite=policy, **options)
        assert recorder.metrics["skipped"].tolist() == [0, 0, 1, 0, 0]
        bad = [name for name, rows in recorder.metrics.items() if not np.isfinite(rows).all()]
        assert bad == ["support_loss/11"]
        return
    with pytest.raises(em.NonFiniteError, match=r"'support_loss/11'.* step 3") as caught:
        boring_fit(5, strategy=extended(bad=3), **options)
    assert (caught.value.step, caught.value.name) == (3, "support_loss/11")


@pytest.mark.parametrize("skip", [False, True])
def test_the_training_program_does_not_grow_with_the_inner_steps(skip):
    def program(steps):
        inner = em.InnerLoop(optax.sgd(0.01), steps)
        strategy = em.FOMAML(em.losses.mse, inner, optax.sgd(0.1))
        root, zero = jax.random.key(0), jnp.int32(0)
        job = Job(strategy, Sampled(TASKS, 2), root, zero, zero, skip)
        state = strategy.init(tiny_mlp())
        _, report = eqx.filter_eval_shape(train_chunk, job, state)
        count = sum(map(len, report.metrics.names))
        compiled = train_chunk.lower(job, state).compile()
        return count, len(jax.tree.leaves(report)), compiled.as_text().count(" = ")

    (few, few_results, few_instructions), (many, results, instructions) = map(program, (4, 300))
    assert many == few + 296
    assert results == few_results
    # With a kernel for each metric they were thirty instructions an inner step.
    assert abs(instructions - few_instructions) < 100
