"""NaN and infinity stop a run, name the step, and reach no checkpoint."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    Checkpoint,
    EarlyStopping,
    ProgressBar,
    TensorBoard,
)

from .boring import BoringStrategy, Recorder, boring_fit


@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("step", [1, 37, 50])
def test_a_loss_that_becomes_nan(step, limit, tmp_path):
    recorder = Recorder(every=10)
    checkpoint = Checkpoint(tmp_path, every=10, keep=None)
    with pytest.raises(
        em.NonFiniteError, match=f"'loss'.* step {step}\\.\nReceived: nan"
    ) as caught:
        boring_fit(
            50,
            strategy=BoringStrategy(nan_loss=step),
            callbacks=[recorder, checkpoint],
            steps_per_execution=limit,
        )
    assert (caught.value.step, caught.value.name) == (step, "loss")
    assert recorder.errors == [caught.value]
    assert recorder.steps_of("on_fit_end") == []
    sound = list(range(10, step, 10))
    assert recorder.steps_of("on_step_end") == sound
    assert sorted(int(path.stem.split("-")[1]) for path in tmp_path.iterdir()) == sound


def test_the_steps_before_the_nan_are_logged(tmp_path):
    # A loss curve that ends a chunk before the trouble does not show it.
    recorder, log = Recorder(), JSONL(tmp_path / "log.jsonl")
    with pytest.raises(em.NonFiniteError):
        boring_fit(
            50,
            strategy=BoringStrategy(nan_loss=37),
            callbacks=[recorder, log],
            steps_per_execution=64,
        )
    assert recorder.rows, "no row was delivered"
    steps = recorder.metrics["step"].tolist()
    assert steps[:36] == list(range(1, 37))
    assert len(log.path.read_text().splitlines()) == len(steps)


def test_parameters_that_become_infinite(tmp_path):
    # At the last step of a chunk, so that no metric could tell; the other leaf stays finite.
    recorder = Recorder(every=20)
    with pytest.raises(em.NonFiniteError, match=r"`model\.bias`.* step 20") as caught:
        boring_fit(
            50,
            strategy=BoringStrategy(inf_model=20),
            callbacks=[recorder, Checkpoint(tmp_path, every=20)],
        )
    assert (caught.value.step, caught.value.name) == (20, "model.bias")
    assert recorder.errors == [caught.value]
    assert recorder.steps_of("on_step_end") == []
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_become_infinite_within_a_chunk():
    # Then the loss of the next step tells.
    with pytest.raises(em.NonFiniteError) as caught:
        boring_fit(50, strategy=BoringStrategy(inf_model=20), steps_per_execution=50)
    assert (caught.value.step, caught.value.name) == (21, "loss")


def test_no_checkpoint_holds_an_optimizer_that_is_not_finite(tmp_path):
    # The model is still finite at step 20: resuming from there could never succeed.
    with pytest.raises(em.NonFiniteError):
        boring_fit(
            50,
            strategy=BoringStrategy(nan_optimizer=20),
            callbacks=[Checkpoint(tmp_path, every=10)],
        )
    for path in tmp_path.iterdir():
        state = em.load(path, boring_fit(1))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state)), path.name


def test_the_first_bad_step_is_named_whichever_metric_it_is():
    class Two(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            early = jnp.where(new.step >= 5, -jnp.inf, 0.0)
            late = jnp.where(new.step >= 6, jnp.nan, 0.0)
            return new, {"a_late": late, "z_early": early, "flag": late > 0, **metrics}

    with pytest.raises(em.NonFiniteError, match="Received: -inf") as caught:
        boring_fit(50, strategy=Two(), steps_per_execution=50)
    assert (caught.value.step, caught.value.name) == (5, "z_early")


def test_half_precision_metrics_and_all_callbacks(tmp_path):
    class Half(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            return new, {
                **metrics,
                "loss": metrics["loss"].astype(jnp.bfloat16),
                "better": metrics["loss"] < 1,
            }

    callbacks = [
        ProgressBar(),
        TensorBoard(tmp_path / "board"),
        JSONL(tmp_path / "log.jsonl"),
        EarlyStopping("loss", patience=100, every=5),
        Checkpoint(tmp_path / "saved", every=10, monitor="loss"),
    ]
    assert int(boring_fit(20, strategy=Half(), callbacks=callbacks).step) == 20
    with pytest.raises(em.NonFiniteError):
        boring_fit(20, strategy=Half(nan_loss=12))
