"""The loop: hooks at exactly their steps, complete metrics, one chunk behind."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest

from eqxmeta._loop import dispatch as _dispatch
from eqxmeta._loop.pace import Pace
from eqxmeta.callbacks import JSONL, Callback, Checkpoint

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    at,
    boring_fit,
    compilations,
    recorders,
    same_bits,
)


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

    train_chunk = _dispatch.train_chunk
    monkeypatch.setattr(_dispatch, "train_chunk", spy)
    return found


def test_the_device_is_a_chunk_ahead_of_the_hooks_at_stops_too(dispatches):
    order = []

    class Watch(Callback):
        every = 20

        def on_chunk_end(self, run, metrics):
            order.append((int(metrics["step"][-1]), dispatches[-1][1]))

        def on_step_end(self, run):
            order.append(("stop", run.step))

    boring_fit(40, callbacks=[Watch()], steps_per_execution=5)
    # (the chunk that is told of, the newest that was dispatched by then)
    first = [(5, 10), (10, 15), (15, 20), (20, 25), ("stop", 20)]
    assert order == [*first, (25, 30), (30, 35), (35, 40), (40, 40), ("stop", 40)]


def test_the_program_is_compiled_before_the_clock_of_the_pace_starts(monkeypatch):
    measured = []
    monkeypatch.setattr(Pace, "measured", lambda self, *args: measured.append(args))
    boring_fit(4, strategy=BoringStrategy(noise=0.375), steps_per_execution=2)
    assert [steps for steps, _ in measured] == [2, 2]
    assert measured[0][1] < 0.1  # compiling takes longer than that


def test_a_run_that_is_stopped_before_it_begins_compiles_nothing():
    class Eager(Callback):
        def on_fit_start(self, run):
            run.request_stop("enough")

    with compilations() as compiled:
        state = boring_fit(10, strategy=BoringStrategy(noise=0.625), callbacks=[Eager()])
    assert int(state.step) == 0
    assert same_bits(state.model, BoringModel())
    assert compiled == []


def test_a_strategy_without_metrics():
    class Silent(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            return BoringStrategy.outer_update(self, state, tasks, key=key)[0], {}

    recorder = Recorder()
    boring_fit(10, strategy=Silent(), callbacks=[recorder], steps_per_execution=4)
    assert recorder.metrics["step"].tolist() == list(range(1, 11))


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


@pytest.mark.parametrize("name", ["step", "skipped", "loss"])
def test_the_names_of_the_run_cannot_be_published(name):
    recorder = Recorder(every=5, act=at("on_step_end", 5, lambda run: run.log({name: 99.0})))
    with pytest.raises(ValueError, match=rf"(?s)taken.*Received: '{name}'.*index, loss, seen"):
        boring_fit(10, callbacks=[recorder])


def test_what_is_published_over_an_error_is_not_lost(tmp_path):
    def act(hook, step, run):
        if hook == "on_chunk_end":
            raise ArithmeticError
        if hook == "on_exception":
            run.log({"last": 1.0})

    log = JSONL(tmp_path / "log.jsonl")
    with pytest.raises(ArithmeticError):
        boring_fit(10, callbacks=[Recorder(act=act), log], steps_per_execution=3)
    assert json.loads(log.path.read_text()) == {"step": 3, "last": 1.0}


def test_what_is_published_between_stops_follows_the_rows_it_belongs_to(tmp_path):
    def publish(hook, step, run):
        if hook == "on_chunk_end":
            run.log({"note": 1.0})

    log = JSONL(tmp_path / "log.jsonl")
    # The one that publishes comes before the one that writes.
    boring_fit(10, callbacks=[Recorder("first", act=publish), log], steps_per_execution=3)
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "note" in row] == [3, 6, 9, 10]
