"""The loop: exact stops, one program, the same bits however it is cut, complete metrics."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta import _loop
from eqxmeta._pace import Pace
from eqxmeta.callbacks import Callback, Checkpoint, Evaluate

from .boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    boring_fit,
    compilations,
)
from .helpers import tiny_mlp, tree_allclose


def same_bits(x, y):
    return tree_allclose(x, y, rtol=0, atol=0)


def expected_events(everys, steps, limit):
    """The hooks of a run, found step by step from their definition rather than by next stops."""
    events = [(name, "on_fit_start", 0) for name in everys]
    since = 0
    for step in range(1, steps + 1):
        due = [name for name, every in everys.items() if every is not None and step % every == 0]
        if due or step == steps or step - since == limit:
            events += [(name, "on_chunk_end", step) for name in everys]
            events += [(name, "on_step_end", step) for name in due]
            since = step
    return events + [(name, "on_fit_end", steps) for name in everys]


def recorders(everys):
    events = []
    return events, [Recorder(name, every=every, events=events) for name, every in everys.items()]


@pytest.mark.parametrize("limit", [1, 3, 64])
@pytest.mark.parametrize("steps", [1, 49, 107])
def test_hooks_run_at_exactly_their_steps(steps, limit):
    everys = {"seven": 7, "ten": 10, "fifty": 50, "never": None}
    events, callbacks = recorders(everys)
    boring_fit(steps, callbacks=callbacks, steps_per_execution=limit)
    assert events == expected_events(everys, steps, limit)


def test_hooks_run_at_exactly_their_steps_at_an_automatic_pace():
    # How the chunks fall depends on the clock; what the host asked for does not.
    everys = {"seven": 7, "ten": 10, "fifty": 50, "never": None}
    events, callbacks = recorders(everys)
    boring_fit(2000, callbacks=callbacks, steps_per_execution="auto")

    def without_chunks(events):
        return [event for event in events if event[1] != "on_chunk_end"]

    assert without_chunks(events) == without_chunks(expected_events(everys, 2000, 1))


def test_hooks_of_a_resumed_run_are_at_absolute_steps(tmp_path):
    # The counterpart of the exact list: the steps do not count from where the run was resumed.
    boring_fit(13, callbacks=[Checkpoint(tmp_path, every=100)])
    path = tmp_path / "step-000000013.ckpt"
    events, callbacks = recorders({"seven": 7, "ten": 10})
    with pytest.warns(RuntimeWarning, match="not attached"):  # the `Checkpoint`
        boring_fit(30, callbacks=callbacks, resume=path, steps_per_execution=64)
    stops = [(step, hook) for name, hook, step in events if name == "seven"]
    assert stops == [
        (13, "on_fit_start"),
        (14, "on_chunk_end"), (14, "on_step_end"),
        (20, "on_chunk_end"),
        (21, "on_chunk_end"), (21, "on_step_end"),
        (28, "on_chunk_end"), (28, "on_step_end"),
        (30, "on_chunk_end"),
        (30, "on_fit_end"),
    ]  # fmt: skip
    assert callbacks[1].steps_of("on_step_end") == [20, 30]


def test_callbacks_that_say_last_run_after_the_others():
    class Last(Recorder):
        last = True

    events = []
    callbacks = [Last("last", every=2, events=events), Recorder("other", every=2, events=events)]
    boring_fit(2, callbacks=callbacks, steps_per_execution=64)
    assert [name for name, _, _ in events] == ["other", "last"] * 4


@pytest.mark.parametrize("limit", [1, 7, 64, "auto"])
def test_every_step_has_one_row_in_order(limit):
    recorder, other = Recorder(every=13), Recorder("other", every=50)
    boring_fit(203, callbacks=[recorder, other], steps_per_execution=limit)
    for metrics in recorder.metrics, other.metrics:
        assert set(metrics) == {"step", "loss", "index", "seen"}
        np.testing.assert_array_equal(metrics["step"], np.arange(1, 204))
        # What the program itself saw of its position, so that rows are not merely numbered well.
        np.testing.assert_array_equal(metrics["index"], np.arange(203))


def test_a_chunk_longer_than_the_buffer_is_cut():
    recorder = Recorder()
    boring_fit(2500, callbacks=[recorder], steps_per_execution=10**6)
    assert recorder.steps_of("on_chunk_end") == [1024, 2048, 2500]
    np.testing.assert_array_equal(recorder.metrics["index"], np.arange(2500))


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


def watched_steps():
    """`(hook, run.step, run.state.step)` in every hook of a run of 40 steps."""
    seen = []

    def look(hook, step, run):
        assert step == run.step
        seen.append((hook, run.step, int(run.state.step)))

    boring_fit(40, callbacks=[Recorder(every=7, act=look)], steps_per_execution=3)
    return seen


def test_run_step_is_the_step_of_run_state_wherever_the_loop_stops():
    seen = [entry for entry in watched_steps() if entry[0] != "on_chunk_end"]
    assert [step for _, step, _ in seen] == [0, 7, 14, 21, 28, 35, 40]
    assert all(step == of_state for _, step, of_state in seen)


def test_run_step_is_the_step_of_run_state_between_stops():
    # `Run.state` is "after `step` steps", without exception: a state under a wrong number is worse
    # than none. By then the newer chunk has consumed it, so that this takes some thought.
    seen = [entry for entry in watched_steps() if entry[0] == "on_chunk_end"]
    assert len(seen) == 17
    assert all(step == of_state for _, step, of_state in seen)


def test_a_state_that_a_callback_kept_stays_what_it_was():
    kept = {}

    def keep(hook, step, run):
        if hook in ("on_fit_start", "on_step_end", "on_fit_end"):
            kept[step] = run.state, jax.tree.map(np.array, run.state)
            assert run.state is run.state  # one copy a step, however many ask

    final = boring_fit(50, callbacks=[Recorder(every=5, act=keep)])
    assert list(kept) == list(range(0, 51, 5))
    for step, (state, values) in kept.items():
        assert int(state.step) == step
        assert same_bits(jax.tree.map(np.array, state), values)
    assert same_bits(kept[50][0], final)


@pytest.fixture
def dispatches(monkeypatch):
    """`(start, stop, state consumed)` of every dispatch of the training program."""
    found = []

    def spy(job, state):
        found.append((int(job.start), int(job.stop), state))
        return train_chunk(job, state)

    train_chunk = _loop.train_chunk
    monkeypatch.setattr(_loop, "train_chunk", spy)
    return found


def test_the_state_is_donated_but_not_the_users_model(dispatches):
    model = BoringModel()
    before = jax.tree.map(np.array, model)
    tasks = BoringTasks()
    state = boring_fit(20, model=model, tasks=tasks, steps_per_execution=4)
    assert len(dispatches) >= 5
    for _, _, consumed in dispatches:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, model)))
    assert same_bits(jax.tree.map(np.array, model), before)
    # Nor does a later run consume what an earlier one returned.
    again = boring_fit(20, model=state.model, tasks=tasks)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, again)))


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


def test_metrics_arrive_one_chunk_behind_and_at_stops_at_once(dispatches):
    order = []

    class Watch(Callback):
        every = 20

        def on_chunk_end(self, run, metrics):
            order.append((int(metrics["step"][-1]), dispatches[-1][1]))

        def on_step_end(self, run):
            order.append(("stop", run.step))

    boring_fit(40, callbacks=[Watch()], steps_per_execution=5)
    # (the chunk that is told of, the newest that was dispatched by then)
    one_round = [(5, 10), (10, 15), (15, 20), (20, 20), ("stop", 20)]
    assert order == one_round + [(a if a == "stop" else a + 20, b + 20) for a, b in one_round]


def test_the_program_is_compiled_before_the_clock_of_the_pace_starts(monkeypatch):
    measured = []
    monkeypatch.setattr(Pace, "measured", lambda self, *args: measured.append(args))
    boring_fit(4, strategy=BoringStrategy(noise=0.375), steps_per_execution=2)
    assert [steps for steps, _ in measured] == [2, 2]
    assert measured[0][1] < 0.1  # compiling takes longer than that


def test_the_pace_aims_at_half_a_second_and_grows_with_care():
    pace = Pace("auto", 1024)
    limits = [pace.limit]
    for _ in range(5):
        pace.measured(pace.limit, pace.limit * 0.01)
        limits.append(pace.limit)
    assert limits == [1, 4, 16, 50, 50, 50]
    pace.measured(50, 50 * 0.1)
    assert pace.limit == 5
    pace.measured(5, 5 * 100.0)  # a step longer than the aim
    assert pace.limit == 1
    pace.measured(1, 0.0)
    assert pace.limit == 4
    fixed = Pace(7, 5)
    fixed.measured(1, 1.0)
    assert fixed.limit == 5


def test_the_pace_does_not_starve_behind_a_frequent_callback():
    # Chunks of one step say little; the limit must still grow beyond them for those who gain.
    pace = Pace("auto", 1024)
    for _ in range(20):
        pace.measured(1, 1e-5)
    assert pace.limit >= 4


def test_a_run_that_is_stopped_before_it_begins_compiles_nothing():
    class Eager(Callback):
        def on_fit_start(self, run):
            run.request_stop("enough")

    with compilations() as compiled:
        state = boring_fit(10, strategy=BoringStrategy(noise=0.625), callbacks=[Eager()])
    assert int(state.step) == 0
    assert same_bits(state.model, BoringModel())
    assert compiled == []


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


def test_a_strategy_without_metrics():
    class Silent(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            return BoringStrategy.outer_update(self, state, tasks, key=key)[0], {}

    recorder = Recorder()
    boring_fit(10, strategy=Silent(), callbacks=[recorder], steps_per_execution=4)
    assert recorder.metrics["step"].tolist() == list(range(1, 11))


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


@pytest.mark.parametrize("step", [0, 5, np.int32(5), jnp.int32(5), jnp.zeros(())])
def test_the_step_is_the_trainers_from_the_start(step):
    # It is what the keys of the tasks are folded from.
    class Elsewhere(BoringStrategy):
        def init(self, model):
            return eqx.tree_at(lambda s: s.step, BoringStrategy.init(self, model), step)

    recorder = Recorder()
    state = boring_fit(10, strategy=Elsewhere(), callbacks=[recorder])
    assert recorder.metrics["index"].tolist() == list(range(10))
    assert same_bits(state, boring_fit(10))


def test_in_64_bits(x64):
    states = [boring_fit(20, steps_per_execution=limit) for limit in (3, 20)]
    assert states[0].model.weight.dtype == jnp.float64
    assert same_bits(*states)
