"""What ends a run, and what a run says: limits, stops, errors of others, the summary."""

import copy
import signal
import time
from datetime import timedelta

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    AdaptationPlot,
    Callback,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    ProgressBar,
    TensorBoard,
)

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    at,
    boring_fit,
    host_batch,
    same_bits,
)

HOOKS_OF_A_RUN = ("on_fit_start", "on_chunk_end", "on_step_end", "on_fit_end")


def test_fit_ends_at_steps_and_returns_that_state():
    recorder = Recorder()
    state = boring_fit(37, callbacks=[recorder])
    assert isinstance(state, em.TrainState)
    assert int(state.step) == 37
    assert recorder.steps_of("on_fit_end") == [37]
    assert recorder.stop_reason is None
    assert recorder.errors == []


def test_a_state_on_the_host_is_one_to_start_from():
    state = jax.device_get(boring_fit(2))
    assert same_bits(boring_fit(4, resume=state), boring_fit(4))


# Trial runs.


def test_fast_dev_run_gives_every_callback_its_turn_but_writes_nothing(tmp_path):
    recorder, never = Recorder(every=1000), Recorder("never")
    evaluate = Evaluate(BoringTasks(), every=1000, num_tasks=3)
    callbacks = [
        recorder,
        never,
        evaluate,
        ProgressBar(),
        EarlyStopping("eval/loss", patience=1),
        TensorBoard(tmp_path / "board"),
        JSONL(tmp_path / "log.jsonl"),
        Checkpoint(tmp_path / "saved", every=1000),
        AdaptationPlot(em.tasks.Sinusoid(3, 3), tmp_path / "plot.png", every=1000),
    ]
    state = boring_fit(10_000, callbacks=callbacks, fast_dev_run=True, resume="auto")
    assert int(state.step) == 3
    assert recorder.steps_of("on_step_end") == recorder.steps_of("on_fit_end") == [3]
    assert recorder.metrics["step"].tolist() == [1, 2, 3]
    assert never.steps_of("on_step_end") == []
    assert evaluate.result is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fast_dev_run", "steps", "taken"), [(5, 100, 5), (5, 2, 2), (False, 9, 9)]
)
def test_fast_dev_run_takes_that_many_steps(fast_dev_run, steps, taken):
    recorder = Recorder(every=1)
    assert int(boring_fit(steps, callbacks=[recorder], fast_dev_run=fast_dev_run).step) == taken
    everys = range(1, taken + 1) if fast_dev_run is False else [taken]
    assert recorder.steps_of("on_step_end") == list(everys)


def test_fast_dev_run_says_what_it_leaves_out(tmp_path, capsys):
    callbacks = [Checkpoint(tmp_path / "saved", every=1000, monitor="loss"), ProgressBar()]
    boring_fit(10_000, callbacks=callbacks, fast_dev_run=True, summary=True)
    out = capsys.readouterr().out
    assert "callbacks   ProgressBar (left out, for they write files: Checkpoint)\n" in out


def test_fast_dev_run_neither_resumes_nor_touches_a_run_that_is_there(tmp_path):
    boring_fit(10, callbacks=[Checkpoint(tmp_path, every=5)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    state = boring_fit(10, callbacks=[Checkpoint(tmp_path, every=5)], fast_dev_run=2, resume="auto")
    assert int(state.step) == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# Ends before the last step.


@pytest.mark.parametrize("as_timedelta", [False, True])
def test_max_time(as_timedelta):
    class Slow(Callback):
        every = 1

        def on_step_end(self, run):
            time.sleep(0.02)

    boring_fit(1)  # compiled: the time is not that of compiling
    recorder = Recorder()
    limit = timedelta(seconds=0.3) if as_timedelta else 0.3
    begin = time.monotonic()
    state = boring_fit(10_000, callbacks=[Slow(), recorder], max_time=limit)
    assert 0 < int(state.step) <= 15
    assert time.monotonic() - begin < 5
    assert recorder.stop_reason == "time limit"
    assert recorder.steps_of("on_fit_end") == [int(state.step)]
    assert recorder.metrics["step"].tolist() == list(range(1, int(state.step) + 1))


def test_a_run_whose_last_step_is_late_is_whole(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("eqxmeta._loop.loop.time.monotonic", lambda: clock[0])
    late = Recorder(every=5, act=at("on_step_end", 5, lambda run: clock.append(clock.pop() + 99)))
    assert int(boring_fit(5, callbacks=[late], max_time=10).step) == 5
    assert late.stop_reason is None


def test_max_time_that_is_not_reached():
    recorder = Recorder()
    assert int(boring_fit(5, callbacks=[recorder], max_time=600).step) == 5
    assert recorder.stop_reason is None


@pytest.mark.parametrize(
    ("hook", "step", "end"),
    [
        ("on_fit_start", 0, 0),
        ("on_chunk_end", 4, 4),  # the next chunk is under way by then, and dropped
        ("on_chunk_end", 10, 10),
        ("on_step_end", 20, 20),
        ("on_log", 20, 20),
        ("on_fit_end", 50, 50),
    ],
)
def test_request_stop_from_each_hook(hook, step, end):
    class Stopper(Recorder):
        def on_log(self, run, scalars):
            self._record("on_log", run.step, run)

        def on_step_end(self, run):
            super().on_step_end(run)
            run.log({"something": 1.0})

    stopper = Stopper("stopper", every=10, act=at(hook, step, lambda run: run.request_stop("why")))
    other = Recorder("other", every=20)
    state = boring_fit(50, callbacks=[stopper, other], steps_per_execution=4)
    assert int(state.step) == end
    for recorder in stopper, other:
        assert recorder.steps_of("on_fit_start") == [0]
        assert recorder.steps_of("on_fit_end") == [end]
        assert recorder.errors == []
        rows = recorder.metrics["step"].tolist() if recorder.rows else []
        assert rows == list(range(1, end + 1))
    # A stop that others are due at is still theirs.
    assert other.steps_of("on_step_end") == [s for s in range(1, end + 1) if s % 20 == 0]
    assert stopper.steps_of("on_step_end") == [s for s in range(1, end + 1) if s % 10 == 0]
    assert other.stop_reason == "why"


def test_the_first_reason_to_stop_is_told(capsys):
    def stop(run):
        run.request_stop("the first reason")
        run.request_stop("the second reason")

    state = boring_fit(
        50, callbacks=[Recorder(every=10, act=at("on_step_end", 20, stop))], summary=True
    )
    assert int(state.step) == 20
    assert capsys.readouterr().out.endswith("stopped at step 20 of 50: the first reason\n")


# Errors.


@pytest.mark.parametrize("hook", HOOKS_OF_A_RUN)
def test_an_error_in_a_hook_reaches_everybody(hook):
    error = RuntimeError("mine")

    def fail(run):
        raise error

    failing = Recorder("failing", every=10, act=at(hook, 0, fail))
    before, after = Recorder("before"), Recorder("after")
    with pytest.raises(RuntimeError, match="mine") as caught:
        boring_fit(30, callbacks=[before, failing, after])
    assert caught.value is error
    for recorder in before, failing, after:
        # The error is not told to whoever has not begun, nor to whoever failed to begin.
        if recorder is not before and hook == "on_fit_start":
            assert recorder.steps_of("on_exception") == []
            continue
        assert recorder.errors == [error]
        assert recorder.events[-1][1] == "on_exception"
    assert signal.getsignal(signal.SIGINT) is not None


def test_a_hook_that_fails_over_an_error_does_not_silence_the_rest():
    class Clumsy(Callback):
        def on_exception(self, run, error):
            raise OSError("disk full")

    recorder = Recorder(every=1, act=at("on_step_end", 1, lambda run: 1 / 0))
    last = Recorder("last")
    with pytest.raises(ZeroDivisionError) as caught:
        boring_fit(3, callbacks=[Clumsy(), recorder, last])
    assert last.errors == [caught.value]
    (note,) = caught.value.__notes__
    assert "Clumsy.on_exception" in note
    assert "disk full" in note


def test_an_interrupt_over_an_error_is_raised_once_all_have_heard_of_it():
    def interrupted(run):
        raise KeyboardInterrupt

    failing = Recorder("f", every=1, act=at("on_step_end", 1, lambda run: 1 / 0))
    first = Recorder("first", act=at("on_exception", 0, interrupted))
    last = Recorder("last")
    with pytest.raises(KeyboardInterrupt) as caught:
        boring_fit(3, callbacks=[first, failing, last])
    assert last.errors == [caught.value.__cause__]
    assert type(caught.value.__cause__) is ZeroDivisionError


def test_an_error_at_the_end_does_not_take_the_end_from_the_others(tmp_path):
    first = Recorder("first", act=at("on_fit_end", 0, lambda run: 1 / 0))
    second = Recorder("second", act=at("on_fit_end", 0, lambda run: [][0]))
    callbacks = [first, second, Checkpoint(tmp_path, every=1000)]
    with pytest.raises(ZeroDivisionError) as caught:
        boring_fit(3, callbacks=callbacks)
    assert second.steps_of("on_fit_end") == [3]
    assert "second.on_fit_end failed as well: IndexError" in caught.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.ckpt"]


def test_a_reason_to_stop_is_not_that_of_an_earlier_fit():
    stop = Recorder(act=at("on_chunk_end", 1, lambda run: run.request_stop("enough")))
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2, callbacks=[stop], summary=False)
    trainer.fit(BoringModel(), BoringTasks(), 5)
    stop._act = at("on_chunk_end", 1, lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(BoringModel(), BoringTasks(), 5)
    assert trainer.stop_reason is None


def test_the_trainer_is_usable_after_an_error():
    failing = Recorder(every=5, act=at("on_step_end", 10, lambda run: 1 / 0))
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2, callbacks=[failing], summary=False)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(BoringModel(), BoringTasks(), 20)
    state = trainer.fit(BoringModel(), BoringTasks(), 20)  # `at` fails once
    assert same_bits(state, boring_fit(20))


# What is printed.


def test_the_summary(capsys):
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), steps=5), optax.sgd(0.1))
    seen = []

    class First(Callback):
        def on_fit_start(self, run):
            seen.append(capsys.readouterr().out)  # before anything else is written
            run.request_stop("seen enough")

    boring_fit(
        20_000, strategy=strategy, callbacks=[First()], meta_batch_size=25, seed=3, summary=True
    )
    assert seen == [
        "strategy    MAML, 5 inner steps\n"
        "model       BoringModel, 4 parameters\n"
        "learns      4 meta-parameters\n"
        "meta-batch  25 tasks a step\n"
        "run         20,000 steps, seed 3\n"
        "callbacks   First\n"
    ]
    assert capsys.readouterr().out == "stopped at step 0 of 20,000: seen enough\n"


def test_the_summary_counts_what_the_strategy_adds_and_where_it_resumes(capsys, tmp_path):
    class Learner(eqx.Module):
        model: BoringModel
        rates: jax.Array

    class Rates(BoringStrategy):
        def unadapted(self, model):
            return model.model

        def init(self, model):
            inner = BoringStrategy.init(self, model)
            return em.TrainState(inner.step, Learner(model, jnp.ones(7)), inner.opt_state)

        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            inner = em.TrainState(state.step, state.model.model, state.opt_state)
            new, metrics = BoringStrategy.outer_update(self, inner, tasks, key=key)
            return em.TrainState(
                new.step, Learner(new.model, state.model.rates), new.opt_state
            ), metrics

    for steps in (1200, 1201):
        capsys.readouterr()
        boring_fit(
            steps,
            strategy=Rates(),
            callbacks=[Checkpoint(tmp_path, every=600)],
            resume="auto",
            summary=True,
        )
    out = capsys.readouterr().out
    assert "strategy    Rates\n" in out
    assert "model       BoringModel, 4 parameters\n" in out
    assert "learns      11 meta-parameters\n" in out
    assert "run         1,201 steps, seed 0, resumed at step 1,200\n" in out
    assert "callbacks   Checkpoint\n" in out


def test_no_summary(capsys):
    boring_fit(
        3, callbacks=[Recorder(act=at("on_fit_start", 0, lambda run: run.request_stop("x")))]
    )
    assert capsys.readouterr().out == ""


def test_what_a_run_tells_its_callbacks():
    seen = []
    strategy = BoringStrategy()
    look = Recorder(act=lambda hook, step, run: seen.append(run))
    boring_fit(9, strategy=strategy, callbacks=[look], seed=4)
    run = seen[0]
    assert all(other is run for other in seen)
    assert (run.steps, run.start, run.resuming) == (9, 0, False)
    assert run.strategy is strategy
    assert run.config["seed"] == 4
    assert run.config["meta_batch_size"] == 2
    assert run.callback_states() == {"recorder": {}}


def test_published_values_reach_every_callback_in_its_own_hook():
    class Listener(Callback):
        def __init__(self, name):
            self.name = name
            self.heard = []

        def on_log(self, run, scalars):
            self.heard.append((run.step, dict(scalars)))

    before, after = Listener("before"), Listener("after")

    def tell(hook, step, run):
        if hook == "on_step_end":
            run.log({"value": step / 2})

    boring_fit(20, callbacks=[before, Recorder(every=8, act=tell), after])
    assert before.heard == after.heard == [(8, {"value": 4.0}), (16, {"value": 8.0})]


def test_stop_by_early_stopping_and_host_source_at_once():
    class Never(em.Strategy):
        """Never improves."""

        loss = BoringStrategy.loss
        init = BoringStrategy.init
        inner_adapt = BoringStrategy.inner_adapt

        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            step = state.step.astype(jnp.float32)
            return em.TrainState(state.step, state.model, state.opt_state), {"loss": step}

    tasks = [host_batch(step) for step in range(100)]
    stop = EarlyStopping("loss", patience=3, every=10)
    assert int(boring_fit(100, strategy=Never(), tasks=tasks, callbacks=[stop]).step) == 40


CALLS = {
    "evaluate": "eqxmeta.evaluate(strategy, state.model, tasks)",
    "test": "eqxmeta.evaluate(strategy, state.model, tasks)",
    "validate": "eqxmeta.evaluate(strategy, state.model, tasks)",
    "predict": "strategy.inner_adapt(state.model, support)",
    "load_from_checkpoint": "eqxmeta.load_best(folder, strategy, model)",
    "save_checkpoint": "eqxmeta.save(path, state)",
}


@pytest.mark.parametrize("name", CALLS)
def test_what_users_of_other_trainers_call_names_the_right_call(name):
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2)
    with pytest.raises(AttributeError) as caught:
        getattr(trainer, name)(BoringModel(), BoringTasks())
    lines = str(caught.value).split("\n")
    assert lines[1] == f"Received: `trainer.{name}`"
    assert lines[2].startswith("Expected: ") and f"`{CALLS[name]}`" in lines[2]
    assert not hasattr(trainer, name)


def test_an_attribute_that_nobody_has_and_copies_of_a_trainer():
    trainer = em.Trainer(BoringStrategy(), meta_batch_size=2)
    with pytest.raises(AttributeError, match=r"^`Trainer` has no attribute 'fitt'\.$"):
        trainer.fitt  # noqa: B018
    assert copy.copy(trainer).meta_batch_size == copy.deepcopy(trainer).meta_batch_size == 2
