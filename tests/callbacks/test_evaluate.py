"""When `Evaluate` measures: at multiples, at the end of a run, before its first step if asked."""

import json
import os
import signal

import numpy as np
import pytest

import eqxmeta as em
from eqxmeta._checkpoint.save_load import read_manifest
from eqxmeta.callbacks import (
    JSONL,
    Callback,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    Lambda,
    TensorBoard,
)

from ..boring import BoringModel, BoringStrategy, BoringTasks, Recorder, at, boring_fit, same_bits
from ..same_run import events_of


def measuring(every, **options):
    return Evaluate(BoringTasks(), every=every, num_tasks=2, **options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(folder):
    return [row["step"] for row in rows_of(folder) if "eval/loss" in row]


def monitored(path):
    return read_manifest(path)["meta"]["monitored"]


def stop_at(step, how):
    """A callback that ends the run after `step`."""
    actions = {
        "request_stop": lambda run: run.request_stop("enough"),
        "Ctrl-C": lambda run: os.kill(os.getpid(), signal.SIGINT),
        "KeyboardInterrupt": lambda run: (_ for _ in ()).throw(KeyboardInterrupt),
    }
    return Recorder("stop", every=1, act=at("on_step_end", step, actions[how]))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_returned_model_is_measured(tmp_path, every):
    evaluate = measuring(2)
    checkpoint = Checkpoint(tmp_path / "saved", every=every, keep=None, monitor="eval/loss")
    state = boring_fit(5, callbacks=[JSONL(tmp_path / "log.jsonl"), evaluate, checkpoint])
    assert measured(tmp_path) == [2, 4, 5]
    row = rows_of(tmp_path)[-1]
    assert row["at_end"] == ["eval/loss"]
    assert not any("at_end" in row for row in rows_of(tmp_path)[:-1])
    # The very model, and the value that its checkpoint says.
    expected = em.evaluate(BoringStrategy(), state.model, BoringTasks(), num_tasks=2)
    assert np.array_equal(evaluate.result.mean(), expected.mean())
    last = monitored(checkpoint.last_path)
    assert last == {
        "name": "eval/loss", "mode": "min", "value": expected.mean()[-1], "at_end": True,
    }  # fmt: skip
    assert row["eval/loss"]["mean"][-1] == last["value"]
    assert em.load(checkpoint.last_path, state).step == 5  # rewritten, and sound


def test_at_a_multiple_the_end_is_measured_once(tmp_path):
    boring_fit(4, callbacks=[JSONL(tmp_path / "log.jsonl"), measuring(2)])
    assert measured(tmp_path) == [2, 4]
    assert not any("at_end" in row for row in rows_of(tmp_path))


@pytest.mark.parametrize("how", ["request_stop", "Ctrl-C", "KeyboardInterrupt", "max_time"])
def test_the_end_is_measured_however_it_came(tmp_path, how):
    checkpoint = Checkpoint(tmp_path, every=10**9, monitor="eval/loss")
    if how == "max_time":
        state = boring_fit(10**8, callbacks=[measuring(10**9), checkpoint], max_time=0.5)
    else:
        callbacks = [measuring(4), stop_at(5, how), checkpoint]
        state = boring_fit(50, callbacks=callbacks, steps_per_execution=1)
    expected = em.evaluate(BoringStrategy(), state.model, BoringTasks(), num_tasks=2)
    assert monitored(tmp_path / f"step-{int(state.step):09}.ckpt")["value"] == expected.mean()[-1]
    # Broken off: an uninterrupted run would have no such file.
    assert checkpoint.best_path is None


def everything(folder):
    return [
        JSONL(folder / "log.jsonl"),
        TensorBoard(folder / "board", every=1),
        measuring(4),
        measuring(6, prefix="other", seed=1),
        # Best at step 8 (at 7 it would be better still), and worse from there on.
        EarlyStopping("eval/loss", patience=3),
        Checkpoint(folder / "saved", every=2, keep=2, monitor="eval/loss"),
    ]


def left(folder, callbacks):
    """What a run left that ended at step 20, but for what names it."""
    *_, stopping, checkpoint = callbacks
    last = read_manifest(folder / "saved" / "step-000000020.ckpt")
    states = last["meta"]["callbacks"]
    return {
        "log": (folder / "log.jsonl").read_bytes(),
        "events": events_of(folder / "board"),
        "at_end": events_of(folder / "board" / "at_end"),
        "curve": events_of(folder / "board" / "inner_steps"),
        "best": checkpoint.best_path.name,
        "stopping": stopping.state_dict(),
        "states": {name: x for name, x in states.items() if name != "TensorBoard"},
        "monitored": last["meta"]["monitored"],
        "leaves": [leaf["sha256"] for leaf in last["leaves"]],
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    callbacks = everything(folder)
    assert int(boring_fit(40, callbacks=callbacks).step) == 20
    found = left(folder, callbacks)
    assert found["best"] == "step-000000008.ckpt"
    assert found["stopping"] == {
        "monitor": "eval/loss", "mode": "min", "best_step": 8, "waited": 3, "observed": True,
        "best": found["stopping"]["best"],
    }  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (5, "request_stop"),  # at no multiple of anything
        (6, "KeyboardInterrupt"),  # where the checkpoint and one of the two evaluations were due
        (7, "steps"),  # all steps that were asked for, and then more
        (10, "steps"),  # an observation here would end the run at step 16
        pytest.param(13, "Ctrl-C", marks=pytest.mark.slow),
        pytest.param(15, "steps", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_as_if_its_end_had_not_been(tmp_path, straight, end, how):
    callbacks = everything(tmp_path)
    if how == "steps":
        state = boring_fit(end, callbacks=callbacks)
    else:
        state = boring_fit(40, callbacks=[*callbacks, stop_at(end, how)], steps_per_execution=1)
    end = int(state.step)
    last = rows_of(tmp_path)[-1]
    assert last["step"] == end and "eval/loss" in last["at_end"]
    marked = [(tag, step) for tag, step, _ in events_of(tmp_path / "board" / "at_end")]
    assert set(marked) >= {("eval/loss", end), ("within_task/eval/loss/after_1", end)}
    assert monitored(callbacks[-1].last_path)["value"] == last["eval/loss"]["mean"][-1]

    callbacks = everything(tmp_path)
    assert int(boring_fit(40, callbacks=callbacks, resume="auto").step) == 20
    resumed = left(tmp_path, callbacks)
    for what, wanted in straight.items():
        assert resumed[what] == wanted, what


def test_twice_broken_off_at_one_step_and_resumed(tmp_path, straight):
    for _ in range(2):  # the second time no step is taken
        stop = Recorder("stop", every=1, act=at("on_step_end", 5, lambda run: run.request_stop("")))
        stop_now = Lambda(
            name="now", on_fit_start=lambda run: run.start == 5 and run.request_stop("at once")
        )
        callbacks = [*everything(tmp_path), stop, stop_now]
        assert int(boring_fit(40, callbacks=callbacks, resume="auto").step) == 5
        assert rows_of(tmp_path)[-1]["at_end"]
    callbacks = everything(tmp_path)
    boring_fit(40, callbacks=callbacks, resume="auto")
    assert left(tmp_path, callbacks) == straight


def test_the_end_of_a_complete_run_may_be_the_best_until_it_goes_on(tmp_path):
    # The loss falls from each evaluation to the next.
    def fit(steps, resume=None):
        checkpoint = Checkpoint(tmp_path, every=2, keep=None, monitor="eval/loss")
        boring_fit(steps, strategy=strategy, callbacks=[measuring(2), checkpoint], resume=resume)
        best = em.load_best(tmp_path, strategy, BoringModel())
        assert checkpoint.best_path == tmp_path / f"step-{int(best.step):09}.ckpt"
        return int(best.step)

    strategy = BoringStrategy(noise=0.0)
    values = {}
    for steps in range(1, 9):
        state = boring_fit(steps, strategy=strategy)
        values[steps] = em.evaluate(strategy, state.model, BoringTasks(), num_tasks=2).mean()[-1]
    assert fit(5) == min((2, 4, 5), key=values.__getitem__)
    assert fit(5, "auto") == min((2, 4, 5), key=values.__getitem__)  # nothing is left to do
    assert fit(8, "auto") == min((2, 4, 6, 8), key=values.__getitem__)
    assert values[5] < values[4] < values[2]


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path):
    def fit():
        checkpoint = Checkpoint(tmp_path / "saved", every=2, monitor="eval/loss")
        callbacks = [JSONL(tmp_path / "log.jsonl"), measuring(2), checkpoint]
        boring_fit(5, callbacks=callbacks, resume="auto")
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert fit() == fit()


def test_a_row_that_is_there_for_the_end_alone_goes(tmp_path):
    def fit(steps):
        log = JSONL(tmp_path / "log.jsonl", every=4)
        boring_fit(
            steps, callbacks=[log, measuring(4), Checkpoint(tmp_path / "a", every=4)], resume="auto"
        )
        return [row["step"] for row in rows_of(tmp_path)]

    assert fit(3) == [3]
    assert fit(6) == [4, 6]
    assert fit(8) == [4, 8]


def test_what_a_callback_of_the_users_logs_at_the_end_is_marked_too(tmp_path):
    def fit(steps):
        test = Lambda(on_fit_end=lambda run: run.log({"test": float(run.step)}))
        stopping = EarlyStopping("test", patience=1, mode="min")
        saving = Checkpoint(tmp_path / "a", every=2)
        callbacks = [JSONL(tmp_path / "log.jsonl"), test, stopping, saving]
        with pytest.warns(UserWarning, match="EarlyStopping never saw 'test'"):
            boring_fit(steps, callbacks=callbacks, resume="auto")
        return {row["step"]: row.get("at_end") for row in rows_of(tmp_path)}

    assert fit(2) == {1: None, 2: ["test"]}
    assert fit(3) == {1: None, 2: None, 3: ["test"]}


def test_the_mark_is_no_name_to_log_under(tmp_path):
    with pytest.raises(ValueError, match="'at_end'"):
        boring_fit(1, callbacks=[Lambda(on_fit_end=lambda run: run.log({"at_end": 1.0}))])


@pytest.mark.parametrize("every", [1, 4])
def test_after_sigterm_there_is_no_time_to_measure(tmp_path, every):
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    terminate = at("on_step_end", 5, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    evaluate, pictures = measuring(4), []
    checkpoint = Checkpoint(tmp_path, every=every, keep=1, monitor="eval/loss")
    callbacks = [Recorder(every=1, act=terminate), evaluate, checkpoint]
    evaluate.on_step_end = lambda run: pictures.append(run.step)
    try:
        with pytest.raises(SystemExit), pytest.warns(RuntimeWarning):
            boring_fit(50, callbacks=callbacks, steps_per_execution=1)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert pictures == [4]
    assert monitored(tmp_path / "step-000000005.ckpt")["value"] is None


def test_a_second_ctrl_c_while_the_end_is_measured_costs_nothing_that_was_learnt(tmp_path):
    class Slow(Callback):
        def on_fit_end(self, run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        boring_fit(5, callbacks=[Slow(), Checkpoint(tmp_path, every=100)])
    straight = boring_fit(5)
    assert same_bits(em.load(tmp_path / "step-000000005.ckpt", straight), straight)


def test_the_start_is_measured_on_request(tmp_path):
    def fit(folder, steps):
        # Callbacks that come later in the list, and begin later, hear of it as well.
        stopping = EarlyStopping("eval/loss", patience=3, mode="max")
        log, saving = JSONL(folder / "log.jsonl"), Checkpoint(folder / "a", every=1)
        callbacks = [measuring(2, at_start=True), log, stopping, saving]
        return int(boring_fit(steps, callbacks=callbacks, resume="auto").step)

    assert fit(tmp_path / "straight", 20) == 6  # after those of steps 0, 2, 4, 6
    assert fit(tmp_path / "resumed", 3) == 3
    assert fit(tmp_path / "resumed", 20) == 6
    logs = [(tmp_path / run / "log.jsonl").read_bytes() for run in ("straight", "resumed")]
    assert logs[0] == logs[1]
    assert measured(tmp_path / "straight") == [0, 2, 4, 6]
    expected = em.evaluate(BoringStrategy(), BoringModel(), BoringTasks(), num_tasks=2)
    assert rows_of(tmp_path / "straight")[0]["eval/loss"]["mean"] == expected.mean().tolist()
    with pytest.raises(Exception, match="at_start"):
        measuring(2, at_start="yes")
