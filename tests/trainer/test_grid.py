"""A grid of numbers at once: each point is the run that it would be alone, and the best is told."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    compilations,
    host_batch,
)
from ..helpers import tiny_mlp, tree_allclose

SINUSOID = em.tasks.Sinusoid(3, 3)
OPTIONS = {"meta_batch_size": 2, "summary": False}


def imaml(outer, inner, strength):
    """An outer rate in the optimizer's state, an inner one in a closure, a field of a strategy."""
    loop = em.InnerLoop(optax.sgd(inner), steps=2)
    adam = optax.inject_hyperparams(optax.adam)(outer)
    strategy = em.IMAML(em.losses.mse, loop, adam, cg_steps=2, strength=strength)
    return em.Trainer(strategy, seed=3, **OPTIONS)


def test_each_point_is_its_single_run(x64):
    model = jax.tree.map(lambda x: x.astype(float), tiny_mlp())
    grid = {"outer": [1e-3, 1e-2], "inner": [0.01, 0.05], "strength": (2, 3.0)}
    with compilations("train_several") as compiled:
        runs = em.fit_grid(imaml, model, SINUSOID, 5, grid=grid)
    with compilations("measure_piece") as measured:
        results = runs.evaluate(SINUSOID, num_tasks=3, inner_steps=3, seed=1)
    assert (len(compiled), len(measured)) == (1, 1)
    assert runs.points[1] == {"outer": 1e-3, "inner": 0.01, "strength": 3.0}
    assert runs.names[-1] == "outer=0.01, inner=0.05, strength=3" and len(runs.names) == 8
    assert repr(runs) == "GridRuns(8 points, 5 steps)"
    for i in (0, 7):
        recorder = Recorder()
        trainer = imaml(**runs.points[i])
        alone = em.Trainer(trainer.strategy, seed=3, callbacks=[recorder], **OPTIONS)
        state = alone.fit(model, SINUSOID, 5)
        assert tree_allclose(runs.state(i), state, rtol=1e-10, atol=1e-10)
        assert tree_allclose(runs.state(runs.names[i]), state, rtol=1e-10, atol=1e-10)
        assert runs.metrics.keys() == recorder.metrics.keys() - {"step"}
        for name, rows in runs.metrics.items():
            np.testing.assert_allclose(rows[i], recorder.metrics[name], rtol=1e-10)
        options = {"num_tasks": 3, "inner_steps": 3, "seed": 1}
        result = em.evaluate(trainer.strategy, state.model, SINUSOID, **options)
        np.testing.assert_allclose(
            results[runs.names[i]].values["loss"], result.values["loss"], rtol=1e-10
        )
    # All eight differ, each of the numbers matters.
    assert len(np.unique(runs.metrics["loss"][:, -1])) == 8
    # They are on the same tasks, of which the board needs to be sure.
    board = em.leaderboard(results)
    means = {name: result.mean()[-1] for name, result in results.items()}
    assert board.places[0].name == min(means, key=lambda name: means[name])
    best = runs.strategy(board.places[0].name)
    assert best is runs.strategies[runs.names.index(board.places[0].name)]


class Line(eqx.Module):
    """`x: [1] -> [1]`."""

    weight: jax.Array

    def __call__(self, x):
        return self.weight * x


def joint(rate):
    strategy = em.Joint(em.losses.mse, em.InnerLoop(optax.sgd(0.01), 1), optax.sgd(rate))
    return em.Trainer(strategy, **OPTIONS)


def test_a_point_that_diverges_is_told_and_comes_last():
    with pytest.warns(
        RuntimeWarning, match=r"`fit_grid` became(.|\n)*rate=1e\+30 at step 2 \(1 of"
    ):
        runs = em.fit_grid(joint, Line(jnp.ones(1)), SINUSOID, 20, grid={"rate": [1e30, 1e-3]})
    assert runs.finite.tolist() == [False, True] and "1 not finite" in repr(runs)
    board = em.leaderboard(runs.evaluate(SINUSOID, num_tasks=3))
    assert [place.name for place in board.places] == ["rate=0.001", "rate=1e+30"]


@pytest.mark.slow
def test_numbers_leave_a_narrow_model_narrow():
    """A number of Python's is of no width of its own; one that JAX traces must be so too."""
    model = Line(jnp.ones(1, jnp.bfloat16))

    class Narrow(BoringStrategy):
        rate: em._types.Number = 0.0

        def init(self, model):
            return em.TrainState(jnp.zeros((), jnp.int32), model, None)

        def outer_update(self, state, tasks, *, key):
            assert (self.rate * state.model.weight).dtype == jnp.bfloat16
            return state, {"loss": jnp.float32(0)}

    runs = em.fit_grid(
        lambda rate: em.Trainer(Narrow(rate=rate), **OPTIONS),
        model, SINUSOID, 1, grid={"rate": [0.1, 0.2]},
    )  # fmt: skip
    assert runs.state(0).model.weight.dtype == jnp.bfloat16


@pytest.mark.slow
def test_devices_share_the_points():
    def trainer(rate, **options):
        return em.Trainer(joint(rate).strategy, **OPTIONS, **options)

    model, grid = Line(jnp.ones(1)), {"rate": [1e-3, 1e-2, 3e-2]}
    runs = em.fit_grid(trainer, model, SINUSOID, 5, grid=grid)
    shared = em.fit_grid(lambda rate: trainer(rate, devices="all"), model, SINUSOID, 5, grid=grid)
    assert tree_allclose(runs.states, shared.states, rtol=1e-5)
    assert len(shared.metrics["loss"]) == 3


# Mistakes.


class Host:
    def __getitem__(self, step):
        return host_batch(step)


def boring(noise):
    return em.Trainer(BoringStrategy(noise=noise), **OPTIONS)


def watched(rate):
    return em.Trainer(BoringStrategy(), callbacks=[Recorder()], **OPTIONS)


def counted(rate):
    return em.Trainer(em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), rate), optax.sgd(0.1)),
                      **OPTIONS)  # fmt: skip


MISTAKES = [
    ({"grid": {}}, ValueError, r"fit_grid\(grid=...\)` is invalid"),
    ({"grid": [0.1]}, ValueError, r"fit_grid\(grid=...\)` is invalid"),
    ({"grid": {"rate": 0.1}}, TypeError, r"fit_grid\(grid={'rate': ...}\)` is invalid"),
    ({"grid": {"rate": []}}, ValueError, "is empty or repeats"),
    ({"grid": {"rate": [0.1, 0.1]}}, ValueError, "is empty or repeats"),
    ({"grid": {"rate": [0.1, np.nan]}}, ValueError, r"fit_grid\(grid={'rate': ...}\)` is invalid"),
    ({"grid": {"rate": ["0.1"]}}, ValueError, r"fit_grid\(grid={'rate': ...}\)` is invalid"),
    ({"grid": {"speed": [0.1]}}, TypeError, "does not take the names(.|\n)*'speed'"),
    ({"make_trainer": joint(0.1)}, TypeError, r"fit_grid\(make_trainer=...\)` is not a function"),
    ({"make_trainer": lambda rate: BoringStrategy()}, TypeError, r"\(rate=0.1\)` is not a trainer"),
    ({"make_trainer": watched}, ValueError, "callbacks, which watch a single"),
    ({"make_trainer": counted}, TypeError, r"InnerLoop\(steps=...\)` is not an integer"),
    ({"steps": 0}, ValueError, r"fit_grid\(steps=...\)"),
    ({"tasks": Host()}, ValueError, r"fit_grid\(tasks=...\)` is read by the host"),
    ({"model": Line}, TypeError, r"fit_grid\(model=...\)` is not a model"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "text"), MISTAKES)
def test_mistakes_are_told_before_anything_is_compiled(mistake, error, text, as_users_run_it):
    arguments = {"make_trainer": joint, "model": Line(jnp.ones(1)), "tasks": SINUSOID, "steps": 3,
                 "grid": {"rate": [0.1]}, **mistake}  # fmt: skip
    with compilations("train_several") as compiled, pytest.raises(error, match=text) as caught:
        em.fit_grid(**arguments)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)
    assert not compiled


def test_a_python_if_on_a_number_is_explained():
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        em.fit_grid(boring, BoringModel(), BoringTasks(), 3, grid={"noise": [0.1, 0.2]})
    (*_, note) = caught.value.__notes__
    assert "make_trainer` of noise" in note and "nothing that a Python `if` looks at" in note


def test_what_is_wrong_without_a_grid_too_is_told_as_by_fit():
    model = Line(jnp.ones(2))  # predictions `[2]`, targets `[1]`
    with pytest.raises(ValueError, match="differ in shape") as caught:
        em.fit_grid(joint, model, SINUSOID, 1, grid={"rate": [1e-3]})
    assert not any("make_trainer" in note for note in getattr(caught.value, "__notes__", []))


def test_runs_are_found_by_index_and_name():
    runs = em.fit_grid(joint, Line(jnp.ones(1)), SINUSOID, 1, grid={"rate": [1e-3]})
    for wrong, error in ((1, IndexError), ("rate=2", KeyError)):
        with pytest.raises(error, match="There is no such run"):
            runs.state(wrong)
