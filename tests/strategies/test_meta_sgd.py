"""Meta-SGD: the rates are learnt, adapt, are checkpointed and drawn."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Histograms, ProgressBar, TensorBoard

from ..helpers import TinyMLP, tiny_mlp, tree_allclose

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


class Line(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return jnp.sum(self.w * x, keepdims=True)


def meta_sgd(steps=1, rate=0.05, outer=None, optimizer=None, **options):
    inner = em.InnerLoop(optimizer or optax.sgd(1.0), steps, **options)
    return em.MetaSGD(em.losses.mse, inner, outer or optax.sgd(1.0), rate=rate)


def linear_task(seed=0) -> em.Task:
    rng = np.random.default_rng(seed)
    xs, xq = rng.standard_normal((2, 5, 3))
    return em.Task((xs, xs @ rng.standard_normal((3, 1))), (xq, xq @ rng.standard_normal((3, 1))))


def test_one_step_against_the_formula(x64):
    """Equation 2 on linear regression, whose gradients and Hessian are known."""
    task, w, rate = linear_task(), np.array([0.3, -0.2, 0.5]), 0.05
    (xs, ys), (xq, yq) = task.support, task.query

    def gradient(x, y, w):
        return 2 / len(x) * x.T @ (x @ w - y[:, 0])

    g = gradient(xs, ys, w)
    adapted = w - rate * g
    outer = gradient(xq, yq, adapted)
    hessian = 2 / len(xs) * xs.T @ xs
    d_w, d_rates = outer - hessian @ (rate * outer), -outer * g

    strategy = meta_sgd(rate=rate)
    state = strategy.init(Line(jnp.asarray(w)))
    assert np.array_equal(state.model.extra.rates.w, np.full(3, rate))
    ours = strategy.inner_adapt(state.model, task.support)
    assert isinstance(ours, Line)
    np.testing.assert_allclose(ours.w, adapted, rtol=1e-12)
    tasks = jax.tree.map(lambda x: x[None], task)
    new, metrics = strategy.outer_update(state, tasks, key=None)
    np.testing.assert_allclose(state.model.model.w - new.model.model.w, d_w, rtol=1e-10)
    np.testing.assert_allclose(
        state.model.extra.rates.w - new.model.extra.rates.w, d_rates, rtol=1e-10
    )
    np.testing.assert_allclose(metrics["loss_before"], np.mean((xq @ w - yq[:, 0]) ** 2))
    np.testing.assert_allclose(metrics["loss"], np.mean((xq @ adapted - yq[:, 0]) ** 2))


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(optax.sgd(1.0), id="sgd", marks=pytest.mark.slow), optax.adam(0.5)],
)
def test_meta_gradient_against_finite_differences(optimizer):
    """In the rates too, in mixed mode, over several steps, with any inner optimizer."""
    strategy = meta_sgd(3, optimizer=optimizer)
    model = strategy.init(tiny_mlp()).model
    check = em.check_meta_gradient(strategy, model, em.tasks.Sinusoid(4, 6).sample(KEY))
    assert check.mixed_vs_reverse < 1e-10 and check.mixed_vs_finite_differences < 1e-6


def test_at_first_it_is_maml_with_the_same_inner_loop():
    tasks = em.tasks.Sinusoid(4, 6)
    inner = em.InnerLoop(optax.sgd(0.1), 2)
    ours, maml = (
        algorithm(em.losses.mse, inner, optax.sgd(0.1)) for algorithm in (em.MetaSGD, em.MAML)
    )
    model = ours.init(tiny_mlp()).model
    result = em.evaluate(ours, model, tasks, num_tasks=4, inner_steps=3)
    expected = em.evaluate(maml, tiny_mlp(), tasks, num_tasks=4, inner_steps=3)
    assert tree_allclose(result.values["loss"], expected.values["loss"], rtol=1e-5)


def test_only_what_adapts_has_rates():
    model = meta_sgd(adapt=lambda m: m.out).init(tiny_mlp()).model
    assert [x.shape for x in jax.tree.leaves(model.extra)] == [(1, 8), (1,)]


@pytest.mark.slow
def test_rates_are_trained_checkpointed_and_drawn(tmp_path):
    tasks = em.tasks.Sinusoid(4, 6)
    strategy = meta_sgd(2, rate=0.01, outer=optax.adam(1e-2))

    def fit(steps, folder, resume=None):
        callbacks = [
            ProgressBar(disable=True),
            TensorBoard(folder / "tensorboard"),
            JSONL(folder / "metrics.jsonl"),
            Histograms(every=3),
            Checkpoint(folder / "checkpoints", every=3),
        ]
        trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=callbacks, summary=False)
        return trainer.fit(tiny_mlp(), tasks, steps, resume=resume)

    whole = fit(6, tmp_path / "whole")
    fit(3, tmp_path / "parts")
    parts = fit(6, tmp_path / "parts", resume="auto")
    assert tree_allclose(whole, parts, rtol=0, atol=0)
    rates = np.concatenate([np.ravel(x) for x in jax.tree.leaves(whole.model.extra)])
    assert np.ptp(rates) > 1e-3
    assert isinstance(strategy.inner_adapt(whole.model, tasks.sample(KEY).support), TinyMLP)

    reader = EventAccumulator(str(tmp_path / "parts/tensorboard"), size_guidance={"histograms": 0})
    reader.Reload()
    assert set(reader.Tags()["histograms"]) == {"parameters/extra", "parameters/model"}
    events = reader.Histograms("parameters/extra")
    assert [event.step for event in events] == [3, 6]
    drawn = events[-1].histogram_value
    assert drawn.num == len(rates) == 25
    np.testing.assert_allclose([drawn.min, drawn.max, drawn.sum],
                               [rates.min(), rates.max(), rates.sum()], rtol=1e-5)  # fmt: skip
    # Each bucket holds what lies between the end of the one before and its own.
    inside = [np.sum(rates <= end * (1 + 1e-6)) for end in drawn.bucket_limit]
    assert np.array_equal(np.cumsum(drawn.bucket)[1:-1], inside[1:-1])
    assert sum(drawn.bucket) == 25


def test_a_model_without_rates_is_refused():
    with pytest.raises(TypeError, match="`model` is not all that `MetaSGD` learns" + THREE_PARTS):
        meta_sgd().inner_adapt(tiny_mlp(), em.tasks.Sinusoid(4, 6).sample(KEY).support)


@pytest.mark.parametrize("rate", [np.float32(0.25), np.float64(0.25), Fraction(1, 4), np.int64(2)])
def test_a_rate_is_any_real_number(rate):
    (first, *_) = jax.tree.leaves(meta_sgd(rate=rate).init(tiny_mlp()).model.extra)
    assert first.dtype == jnp.float32 and np.all(np.asarray(first) == float(rate))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("rate", ["fast", True, float("nan"), None])
def test_a_wrong_rate_is_named(rate):
    with pytest.raises(ValueError, match=r"`MetaSGD\(rate=...\)`" + THREE_PARTS):
        meta_sgd(rate=rate)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("every", [0, 1.5])
def test_a_wrong_cadence_of_histograms_is_named(every):
    with pytest.raises((TypeError, ValueError), match=r"`Histograms\(every=...\)`" + THREE_PARTS):
        Histograms(every=every)
