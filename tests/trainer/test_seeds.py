"""Several seeds at once: each is the run that it would be alone, and their statistics."""

import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._trainer import several as _several
from eqxmeta._trainer.runs import SeedRuns
from eqxmeta._trainer.seeds import fit_seeds

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    compilations,
    host_batch,
    same_bits,
)
from ..helpers import tiny_mlp, tree_allclose

SINUSOID = em.tasks.Sinusoid(3, 3)


def boring(strategy=None, **options):
    strategy = BoringStrategy() if strategy is None else strategy
    return em.Trainer(strategy, **{"meta_batch_size": 2, "summary": False, **options})


def maml():
    inner = em.InnerLoop(optax.sgd(0.01), steps=2)
    return em.MAML(em.losses.mse, inner, optax.adam(1e-3))


def assert_equals_single_runs(runs, strategy, models, tasks, steps):
    for i, seed in enumerate(runs.seeds):
        recorder = Recorder()
        alone = boring(strategy, seed=seed, callbacks=[recorder]).fit(models[i], tasks, steps)
        assert tree_allclose(runs.state(i), alone, rtol=1e-4, atol=1e-5)
        assert runs.metrics.keys() == recorder.metrics.keys() - {"step"}
        for name, rows in runs.metrics.items():
            assert rows.shape == (len(runs.seeds), steps)
            np.testing.assert_allclose(rows[i], recorder.metrics[name], rtol=1e-4, atol=1e-5)


# Each seed is a run of its own.


@pytest.mark.slow
def test_each_seed_is_its_single_run_with_maml():
    trainer, model = boring(maml(), seed=4), tiny_mlp()
    runs = fit_seeds(trainer, model, SINUSOID, 30, seeds=3)
    assert runs.seeds == (4, 5, 6)
    assert runs.finite.tolist() == [True] * 3
    assert runs.states.step.tolist() == [30] * 3
    assert repr(runs) == f"SeedRuns(3 seeds, 30 steps, mean loss {runs.mean()[-1]:.4g})"
    assert_equals_single_runs(runs, maml(), [model] * 3, SINUSOID, 30)
    losses = runs.metrics["loss"]
    assert len(np.unique(losses[:, 0])) == len(np.unique(losses[:, -1])) == 3
    evaluation = em.evaluate(maml(), runs.state(-1).model, SINUSOID, num_tasks=3)
    assert np.isfinite(evaluation.mean()).all()
    support = SINUSOID.sample(jax.random.key(0)).support
    maml().inner_adapt(runs.state(0).model, support)


class Dropped(eqx.Module):
    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, *, key=None):
        return self.layer(self.dropout(jnp.tile(x, 4), key=key))


def dropped(seed, p=0.5):
    return Dropped(eqx.nn.Linear(4, 1, key=jax.random.key(seed)), eqx.nn.Dropout(p))


@pytest.mark.slow
def test_each_seed_is_its_single_run_with_reptile_dropout_and_a_model_each():
    strategy = em.Reptile(
        em.losses.mse,
        em.InnerLoop(optax.adam(0.01, b1=0.0), steps=2),
        optax.sgd(optax.linear_schedule(1.0, 0.0, 60)),
        batch_size=2,
        inner_state="carry",
    )
    models = [dropped(0), dropped(1)]
    trainer = boring(strategy, steps_per_execution=7)
    runs = fit_seeds(trainer, models, SINUSOID, 30, seeds=[9, 2])
    assert_equals_single_runs(runs, strategy, models, SINUSOID, 30)
    assert runs.states.model.dropout.p == 0.5  # not an array: as it was, without an axis


def test_models_differ_at_the_start_only_if_told_to():
    class Still(BoringStrategy):
        def outer_update(self, state, tasks, *, key):
            return state, {"loss": jnp.sum(state.model.weight)}

    models = [eqx.tree_at(lambda m: m.weight, BoringModel(), jnp.full(3, i)) for i in (1.0, 2.0)]
    runs = fit_seeds(boring(Still()), models, BoringTasks(), 2, seeds=2)
    assert runs.metrics["loss"].tolist() == [[3, 3], [6, 6]]
    runs = fit_seeds(boring(Still()), models[1], BoringTasks(), 2, seeds=2)
    assert runs.metrics["loss"].tolist() == [[6, 6], [6, 6]]
    assert same_bits(models[1].weight, jnp.full(3, 2.0))  # the user's own is left as it is


def test_one_program_for_any_number_of_steps():
    strategy = BoringStrategy(noise=0.125)  # not compiled by another test
    with compilations("train_several") as compiled:
        short = fit_seeds(boring(strategy), BoringModel(), BoringTasks(), 1, seeds=2)
        long = fit_seeds(boring(strategy), BoringModel(), BoringTasks(), 2000, seeds=[3, 1])
        fit_seeds(boring(strategy, seed=8), BoringModel(), BoringTasks(), 5, seeds=2)
    assert len(compiled) == 1
    assert short.metrics["index"].tolist() == [[0], [0]]
    assert (long.metrics["index"] == np.arange(2000)).all()


def test_the_cut_leaves_no_trace():
    runs = [
        fit_seeds(boring(steps_per_execution=n), BoringModel(), BoringTasks(), 50, seeds=2)
        for n in (1, 13, 50)
    ]
    for other in runs[1:]:
        assert same_bits(runs[0].states, other.states)
        assert same_bits(runs[0].metrics, other.metrics)


def test_fast_dev_run_and_max_time(capsys):
    runs = fit_seeds(
        boring(fast_dev_run=True), BoringModel(), BoringTasks(), 50, seeds=np.arange(2)
    )
    assert runs.metrics["loss"].shape == (2, 3)
    assert (runs.seeds, runs.steps, runs.stop_reason) == ((0, 1), 3, None)
    trainer = boring(max_time=1e-6, summary=True)
    runs = fit_seeds(trainer, BoringModel(), BoringTasks(), 50, seeds=2)
    assert runs.metrics["loss"].shape == (2, 1)
    assert (runs.steps, runs.stop_reason) == (50, "time limit")
    assert "stopped at step 1 of 50: time limit" in capsys.readouterr().out


# A run that diverges.


def test_a_run_that_diverges_leaves_the_others_right():
    # The loss grows with a power of the weight, and at once from the large ones.
    class Cube(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return x * self.weight**3

    strategy = em.Joint(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.sgd(0.1))
    models = [Cube(jnp.float32(w)) for w in (0.1, 1e5, 0.2)]
    with pytest.warns(RuntimeWarning, match=r"seed 8 at step \d+ \(1 of 3 runs\)"):
        runs = fit_seeds(boring(strategy), models, SINUSOID, 20, seeds=[7, 8, 9])
    assert runs.finite.tolist() == [True, False, True]
    assert repr(runs) == "SeedRuns(3 seeds, 20 steps, mean loss nan, 1 not finite)"
    assert np.isnan(runs.mean()[-1]) and np.isnan(runs.ci95()[-1])
    good = SeedRuns(
        (7, 9),
        jax.tree.map(lambda x: x[::2], runs.states),
        {name: rows[::2] for name, rows in runs.metrics.items()},
        runs.finite[::2],
        runs.steps,
        runs.stop_reason,
    )
    assert_equals_single_runs(good, strategy, models[::2], SINUSOID, 20)


@pytest.mark.parametrize(
    ("broken", "step"), [({"nan_loss": 6}, 6), ({"inf_model": 6}, 7), ({"nan_optimizer": 20}, 20)]
)
def test_the_first_bad_step_is_told(broken, step):
    trainer = boring(BoringStrategy(**broken), steps_per_execution=20)
    with pytest.warns(RuntimeWarning, match=f"seed 0 at step {step}, seed 1 at step {step} "):
        fit_seeds(trainer, BoringModel(), BoringTasks(), 20, seeds=2)


def test_what_was_infinite_to_begin_with_is_meant():
    model = eqx.tree_at(lambda m: m.bias, BoringModel(), jnp.array([-jnp.inf]))

    class Still(BoringStrategy):
        def outer_update(self, state, tasks, *, key):
            return state, {"loss": jnp.float32(1)}

    runs = fit_seeds(boring(Still()), model, BoringTasks(), 2, seeds=2)
    assert runs.finite.all()


# Statistics.


def runs_of(values):
    state = em.TrainState(jnp.int32(0), BoringModel(), None)
    n = len(values)
    return SeedRuns(tuple(range(n)), state, {"loss": np.array(values)}, np.ones(n, bool), 2, None)


def test_mean_and_interval_by_hand():
    runs = runs_of([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0]])
    assert runs.mean().tolist() == [2, 2]
    # Standard deviations 1 and sqrt(12), of three.
    np.testing.assert_allclose(runs.ci95(), 4.302653 * np.array([1, 12**0.5]) / 3**0.5, rtol=1e-6)


def test_statistics_that_do_not_exist():
    with pytest.raises(ValueError, match=r"interval.*\nReceived: 1 seed\nExpected: 2 or more"):
        runs_of([[1.0]]).ci95()
    assert runs_of([[1.0]]).mean().tolist() == [1]
    for statistic in (runs_of([[1.0], [2.0]]).mean, runs_of([[1.0], [2.0]]).ci95):
        with pytest.raises(KeyError, match="no such metric"):
            statistic("accuracy")
    for index in (2, -3):
        text = rf"no such run.*\nReceived: {index}\nExpected: -2 to 1"
        with pytest.raises(IndexError, match=text):
            runs_of([[1.0], [2.0]]).state(index)


# Mistakes.


class Host:
    def __getitem__(self, step):
        return host_batch(step)


NAN = eqx.tree_at(lambda m: m.bias, BoringModel(), jnp.full(1, jnp.nan))
MISTAKES = [
    ({"seeds": 0}, ValueError, r"fit_seeds\(seeds=...\)` is too small"),
    ({"seeds": True}, TypeError, r"fit_seeds\(seeds=...\)` is not an integer"),
    ({"seeds": "12"}, TypeError, r"fit_seeds\(seeds=...\)` is not an integer"),
    ({"seeds": []}, ValueError, "empty or repeats"),
    ({"seeds": [1, 2, 1]}, ValueError, "empty or repeats"),
    ({"seeds": [1, 2.0]}, TypeError, r"fit_seeds\(seeds=...\)` is not a seed"),
    ({"seeds": [1, -1]}, ValueError, r"fit_seeds\(seeds=...\)` is out of range"),
    ({"steps": 0}, ValueError, r"fit_seeds\(steps=...\)"),
    ({"trainer": BoringStrategy()}, TypeError, "is not a trainer"),
    ({"trainer": boring(callbacks=[Recorder()])}, ValueError, "callbacks, which watch a single"),
    ({"tasks": Host()}, ValueError, "read by the host"),
    ({"tasks": 3}, TypeError, r"fit_seeds\(tasks=...\)` is not a task source"),
    ({"model": BoringModel}, TypeError, r"fit_seeds\(model=...\)` is not a model"),
    ({"model": NAN}, ValueError, r"fit_seeds\(model=...\)` has NaN among"),
    ({"model": [BoringModel()]}, ValueError, "not one model per seed"),
    ({"model": [BoringModel(), BoringModel]}, TypeError, r"fit_seeds\(model=...\)\[1\]"),
    ({"model": [BoringModel(), BoringModel(1)]}, ValueError, r"weight: float32\[3\] and float32"),
    ({"model": [tiny_mlp(), dropped(0)]}, ValueError, "differs between models 0 and 1"),
    ({"model": [dropped(0), dropped(0, 0.1)]}, ValueError, "differs between models 0 and 1"),
]


@pytest.mark.parametrize(("mistake", "error", "text"), MISTAKES)
def test_mistakes_are_told_before_anything_is_compiled(mistake, error, text, as_users_run_it):
    arguments = {
        "trainer": boring(),
        "model": BoringModel(),
        "tasks": BoringTasks(),
        "steps": 3,
        "seeds": 2,
        **mistake,
    }
    with compilations("train_several") as compiled, pytest.raises(error, match=text) as caught:
        fit_seeds(**arguments)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)
    assert not compiled


def test_mistakes_of_the_strategy_are_told_as_by_fit():
    class Vector(BoringStrategy):
        def outer_update(self, state, tasks, *, key):
            return state, {"loss": jnp.zeros(2)}

    with pytest.raises(ValueError, match="outer_update` are invalid"):
        fit_seeds(boring(Vector()), BoringModel(), BoringTasks(), 3, seeds=2)


def test_the_first_interrupt_ends_all_runs(capsys, monkeypatch):
    steps = []

    def interrupted(batch, states, train=_several.train_several):
        steps.append(int(batch.stop))
        if steps[-1] >= 20:
            signal.raise_signal(signal.SIGINT)
        return train(batch, states)

    monkeypatch.setattr(_several, "train_several", interrupted)
    trainer = boring(steps_per_execution=10, summary=True)
    # A shell's background job ignores Ctrl-C, and then so do we.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runs = fit_seeds(trainer, BoringModel(), BoringTasks(), 100, seeds=2)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert runs.metrics["loss"].shape == (2, 20)
    assert (runs.steps, runs.stop_reason) == (100, "interrupted")
    assert "stopped at step 20 of 100: interrupted" in capsys.readouterr().out
