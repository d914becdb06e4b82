"""What a run costs, in counts that do not depend on the machine: they may fall, never rise."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta._jaxpr.flops import count_flops
from eqxmeta._loop import loop as _loop
from eqxmeta._loop.chunk import Job, train_chunk
from eqxmeta._task.device_source import Sampled
from eqxmeta.callbacks import JSONL, Checkpoint, ProgressBar, TensorBoard

from ..boring import BoringModel, BoringStrategy, BoringTasks, Recorder, compilations
from ..helpers import tiny_mlp


def notebook(gradient="mixed", steps=1):
    """The founding notebook's MAML: 16 tasks of 32 + 32 points, an MLP 1-40-40-1."""
    inner = em.InnerLoop(optax.sgd(0.01), steps, gradient)
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3))
    model = eqx.nn.MLP(1, 1, 40, 2, key=jax.random.key(0))
    return strategy, strategy.init(model), Sampled(em.tasks.Sinusoid(32, 32), 16)


def compiled_chunk(strategy, state, source):
    job = Job(strategy, source, jax.random.key(0), jnp.int32(0), jnp.int32(5))
    return train_chunk.lower(job, state).compile()


@contextlib.contextmanager
def transfers(monkeypatch):
    """Counts what the loop fetches from the device."""
    fetched, get = [], jax.device_get

    def device_get(x):
        fetched.append(x)
        return get(x)

    monkeypatch.setattr(_loop.jax, "device_get", device_get)
    yield fetched


def test_a_run_with_every_callback_compiles_its_step_once(tmp_path):
    inner = em.InnerLoop(optax.sgd(0.01), steps=1)
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3))
    callbacks = [
        ProgressBar(disable=True),
        TensorBoard(tmp_path / "tensorboard"),
        JSONL(tmp_path / "metrics.jsonl"),
        Checkpoint(tmp_path / "checkpoints", every=7),
    ]
    trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=callbacks, summary=False)
    with compilations() as compiled:
        trainer.fit(tiny_mlp(), em.tasks.Sinusoid(2, 2), 40)
    assert len(compiled) == 1


def test_one_transfer_a_chunk(monkeypatch):
    with transfers(monkeypatch) as fetched:
        trainer = em.Trainer(
            BoringStrategy(),
            meta_batch_size=2,
            steps_per_execution=10,
            summary=False,
            callbacks=[Recorder(every=25)],
        )
        trainer.fit(BoringModel(), BoringTasks(), 50)
    # Stops at 10, 20, 25, 35, 45, 50; and whether the state is finite to begin with.
    assert len(fetched) == 6 + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "steps", "kib"),
    [
        pytest.param("mixed", 1, 1300, marks=pytest.mark.slow),
        ("mixed", 5, 1700),
        pytest.param("reverse", 5, 3400, marks=pytest.mark.slow),
    ],
)
@pytest.mark.optimised
def test_memory_of_the_training_program(gradient, steps, kib):
    compiled = compiled_chunk(*notebook(gradient, steps))
    assert compiled.memory_analysis().temp_size_in_bytes < kib * 1024


@pytest.mark.parametrize(
    ("gradient", "steps", "forwards"), [("mixed", 1, 13.5), ("reverse", 5, 51), ("mixed", 5, 67)]
)
def test_operations_of_an_outer_step(gradient, steps, forwards):
    # In forward passes of one set of points (support or query) through the matrices.
    strategy, state, source = notebook(gradient, steps)
    tasks = jax.eval_shape(source.first, jax.random.key(0))
    count = count_flops(
        lambda s, t: strategy.outer_update(s, t, key=jax.random.key(0)), state, tasks
    )
    forward = 16 * 32 * 2 * (40 + 40 * 40 + 40)
    assert count < forwards * forward
