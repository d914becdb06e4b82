"""The training program: one for all lengths, the same bits however it is cut, odd states."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Evaluate

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    boring_fit,
    compilations,
    recorders,
    same_bits,
)
from ..helpers import tiny_mlp, tree_allclose


def test_one_program_for_all_cadences_and_no_more_for_the_next_runs():
    strategy = BoringStrategy(noise=0.125)  # not used elsewhere: its program is not cached yet
    everys = {"a": 7, "b": 10, "c": 50, "d": 33, "e": 64}
    trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=recorders(everys)[1], summary=False)
    with compilations() as first:
        trainer.fit(BoringModel(), BoringTasks(), 300)
    assert len(first) == 1
    with compilations() as second:
        trainer.fit(BoringModel(), BoringTasks(), 311)
        for limit in (1, 5, "auto"):
            boring_fit(20, strategy=strategy, seed=3, steps_per_execution=limit)
        boring_fit(20, strategy=strategy, callbacks=recorders({"x": 3})[1])
        boring_fit(20, strategy=strategy, fast_dev_run=True)
    assert second == []


def test_one_program_for_a_built_in_strategy_resumed_or_not(tmp_path):
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(1e-3))

    def fit(steps, resume=None):
        trainer = em.Trainer(
            strategy,
            meta_batch_size=2,
            callbacks=[Checkpoint(tmp_path, every=5), *recorders({"a": 3})[1]],
            summary=False,
        )
        return trainer.fit(tiny_mlp(), em.tasks.Sinusoid(2, 2), steps, resume=resume)

    with compilations() as compiled:
        fit(11)
        fit(20, resume="auto")
    assert len(compiled) == 1


@pytest.mark.parametrize("where", ["model", "opt_state", "step"])
def test_one_program_when_the_users_state_is_weakly_typed(where):
    # `jnp.asarray(0.5)` is weak, the program's own results are not: two programs, if nobody minds.
    class Weak(BoringStrategy):
        def init(self, model):
            def weak(tree):
                return jax.tree.map(lambda x: jax.lax.full(x.shape, 0.0), tree)

            state = BoringStrategy.init(self, model)
            values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
            values[where] = jnp.asarray(0) if where == "step" else weak(values[where])
            assert any(leaf.weak_type for leaf in jax.tree.leaves(values[where]))
            return em.TrainState(**values)

    with compilations() as compiled:
        boring_fit(10, strategy=Weak(), steps_per_execution=3)
    assert len(compiled) == 1


@pytest.mark.optimised
def test_the_cut_and_the_callbacks_leave_no_trace_in_the_state():
    plain = boring_fit(150, steps_per_execution=64)
    assert int(plain.step) == 150
    assert float(jnp.abs(plain.model.weight).sum()) > 0
    for limit in (1, 7, "auto"):
        assert same_bits(plain, boring_fit(150, steps_per_execution=limit)), limit

    def meddle(hook, step, run):
        jax.tree.map(np.asarray, run.state)
        run.log({"note": 1.0})

    watchers = [
        Recorder("a", every=7, act=meddle),
        Recorder("b", every=10, act=meddle),
        Evaluate(BoringTasks(), every=20, num_tasks=5),
    ]
    for count in range(1, len(watchers) + 1):
        for some in itertools.combinations(watchers, count):
            assert same_bits(plain, boring_fit(150, callbacks=some))


@pytest.mark.slow
@pytest.mark.optimised
def test_the_cut_leaves_no_trace_with_dropout_and_adam():
    class Dropped(eqx.Module):
        layer: eqx.nn.Linear
        dropout: eqx.nn.Dropout

        def __call__(self, x, *, key=None):
            return self.layer(self.dropout(jnp.tile(x, 4), key=key))

    strategy = em.Reptile(
        em.losses.mse,
        em.InnerLoop(optax.adam(0.01, b1=0.0), steps=2),
        optax.sgd(optax.linear_schedule(1.0, 0.0, 60)),
        batch_size=2,
        inner_state="carry",
    )
    model = Dropped(eqx.nn.Linear(4, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5))
    tasks = em.tasks.Sinusoid(3, 3)
    states = [
        boring_fit(60, strategy=strategy, model=model, tasks=tasks, steps_per_execution=limit)
        for limit in (1, 11, 60)
    ]
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])
    other = boring_fit(60, strategy=strategy, model=model, tasks=tasks, seed=1)
    assert not same_bits(states[0].model, other.model)


@pytest.mark.slow
@pytest.mark.optimised
def test_in_64_bits(x64):
    states = [boring_fit(20, steps_per_execution=limit) for limit in (3, 20)]
    assert states[0].model.weight.dtype == jnp.float64
    assert same_bits(*states)


def test_tasks_depend_on_seed_and_step_alone():
    recorder = Recorder()
    boring_fit(30, seed=5, callbacks=[recorder], steps_per_execution=4)
    for step in (0, 1, 17, 29):
        key = jax.random.fold_in(jax.random.key(5), step)
        tasks = jax.vmap(BoringTasks().sample)(jax.random.split(key, 2))
        np.testing.assert_allclose(
            recorder.metrics["seen"][step], jnp.mean(tasks.query[1]), rtol=1e-5
        )


def test_the_state_is_that_of_outer_updates_one_by_one():
    strategy = BoringStrategy(noise=0.0)  # so that the reference needs no key but the tasks'
    state = strategy.init(BoringModel())
    kept = {}

    def keep(hook, step, run):
        if hook == "on_step_end":
            kept[step] = run.state

    fitted = boring_fit(40, strategy=strategy, callbacks=[Recorder(every=8, act=keep)])
    for step in range(40):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 2)
        state, _ = strategy.outer_update(state, jax.vmap(BoringTasks().sample)(keys), key=None)
        if step + 1 in kept:
            assert tree_allclose(kept.pop(step + 1), state, rtol=1e-5, atol=1e-6)
    assert not kept
    assert tree_allclose(fitted, state, rtol=1e-5, atol=1e-6)


def test_leaves_that_share_a_buffer_can_be_donated():
    shared = jnp.zeros(3)
    model = eqx.tree_at(lambda m: m.bias, BoringModel(), shared[:1])
    model = (model, eqx.tree_at(lambda m: m.weight, model, model.weight))

    class Pair(eqx.Module):
        first: BoringModel
        second: BoringModel

        def __call__(self, x):
            return self.first(x) + self.second(x)

    strategy = em.Joint(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps=1), optax.sgd(0.1))
    pair = Pair(*model)
    assert pair.first.weight is pair.second.weight
    with pytest.warns(RuntimeWarning, match=r"eqx\.nn\.Shared"):
        state = boring_fit(10, strategy=strategy, model=pair, steps_per_execution=3)
    assert float(jnp.abs(state.model.second.weight).sum()) > 0


def test_no_buffers_pile_up():
    boring_fit(10)
    live = []

    def count(hook, step, run):
        if hook == "on_step_end":
            live.append(len(jax.live_arrays()))

    boring_fit(200, callbacks=[Recorder(every=10, act=count)], steps_per_execution=5)
    assert max(live[2:]) <= live[1]


def test_states_with_numpy_arrays_and_keys_and_integers():
    class Odd(eqx.Module):
        weight: np.ndarray
        key: jax.Array
        table: jax.Array
        rate: float
        mask: np.ndarray

        def __call__(self, x):
            return self.rate * jnp.sum(self.weight * self.mask * x, keepdims=True)

    model = Odd(
        np.ones(3, np.float32), jax.random.key(7), jnp.arange(3), 2.0, np.array([True, True, False])
    )
    strategy = em.FOMAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps=1), optax.sgd(0.1))
    states = [
        boring_fit(9, strategy=strategy, model=model, steps_per_execution=limit) for limit in (2, 9)
    ]
    assert same_bits(*states)
    fitted = states[0].model
    assert fitted.rate == 2.0
    assert jax.random.key_data(fitted.key).tolist() == jax.random.key_data(model.key).tolist()
    assert fitted.table.tolist() == [0, 1, 2]
    assert np.array_equal(model.weight, np.ones(3))
    assert not np.array_equal(fitted.weight[:2], np.ones(2))


def test_infinite_constants_of_the_model_are_not_mistaken_for_divergence():
    class Masked(eqx.Module):
        weight: jax.Array
        mask: jax.Array

        def __call__(self, x):
            return jnp.sum(self.weight * x * (jax.lax.stop_gradient(self.mask) == 0), keepdims=True)

    model = Masked(jnp.zeros(3), jnp.array([0.0, -jnp.inf, 0.0]))
    strategy = em.FOMAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps=1), optax.sgd(0.1))
    state = boring_fit(5, strategy=strategy, model=model)
    assert np.isneginf(state.model.mask[1])


def test_the_step_is_the_trainers():
    class Confused(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            return em.TrainState(jnp.int32(77), new.model, new.opt_state), metrics

    recorder = Recorder()
    state = boring_fit(10, strategy=Confused(), callbacks=[recorder])
    assert int(state.step) == 10
    assert recorder.metrics["index"].tolist() == list(range(10))


def test_the_step_is_the_trainers_from_the_start():
    # It is what the keys of the tasks are folded from.
    class Elsewhere(BoringStrategy):
        def init(self, model):
            return eqx.tree_at(lambda s: s.step, BoringStrategy.init(self, model), start["step"])

    start = {}
    straight = boring_fit(10)
    for step in (0, 5, np.int32(5), jnp.int32(5), jnp.zeros(())):
        start["step"] = step
        recorder = Recorder()
        state = boring_fit(10, strategy=Elsewhere(), callbacks=[recorder])
        assert recorder.metrics["index"].tolist() == list(range(10))
        assert same_bits(state, straight)
