import json
import math

import numpy as np
import pytest

from eqxmeta._callback.callback import attach
from eqxmeta._callback.published import Curve, Image
from eqxmeta.callbacks import EarlyStopping

from ..fake_run import fake_run


def observe(callback, values, *, start=0, run=None):
    """Publish `values` at steps 10, 20, ...; the step of the stop request, or None."""
    run = fake_run(callback, start=start) if run is None else run
    callback.on_fit_start(run)
    for i, value in enumerate(values):
        if run.stop_reason is not None:
            break
        run.step = start + 10 * (i + 1)
        run.log({"eval/loss": float(value) if isinstance(value, int) else value})
    return run.step if run.stop_reason is not None else None


@pytest.mark.parametrize(
    "kwargs, values, stop",
    [
        ({}, [3, 2, 1, 0], None),
        ({}, [3, 2, 2, 2], 40),
        ({}, [3, 4, 2, 3, 3], 50),
        ({"min_delta": 0.5}, [3, 2.6, 2.5], 30),
        ({"min_delta": 0.5}, [3, 2.4, 1.8], None),
        ({"mode": "max"}, [1, 2, 3, 4], None),
        ({"mode": "max"}, [4, 3, 2], 30),
        ({}, [3, math.nan, math.nan], 30),
        ({}, [math.nan, math.nan], 20),
    ],
)
def test_stops_after_patience_observations_without_improvement(kwargs, values, stop):
    assert observe(EarlyStopping("eval/loss", patience=2, **kwargs), values) == stop


def test_last_point_of_a_curve_counts():
    curves = [Curve(np.array([9.0 - i, 1.0 + i]), np.zeros(2)) for i in range(3)]
    assert observe(EarlyStopping("eval/loss", patience=2), curves) == 30


def test_reason_names_the_metric_and_the_best():
    run = fake_run(callback := EarlyStopping("eval/loss", patience=1))
    observe(callback, [0.25, 0.5], run=run)
    assert "eval/loss" in str(run.stop_reason) and "0.25 at step 10" in str(run.stop_reason)


def test_resumed_run_stops_where_the_whole_one_does():
    values = [3.0, 2.0, 2.5, 2.5, 2.5]
    assert observe(EarlyStopping("eval/loss", patience=3), values) == 50
    first = EarlyStopping("eval/loss", patience=3)
    assert observe(first, values[:3]) is None
    second = EarlyStopping("eval/loss", patience=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert observe(second, values[3:], start=30) == 50


def test_stopped_run_stays_stopped_unless_patience_grows():
    first = EarlyStopping("eval/loss", patience=1)
    assert observe(first, [1.0, 2.0]) == 20
    for patience, stopped in ((1, True), (2, False)):
        second = EarlyStopping("eval/loss", patience=patience)
        second.load_state_dict(first.state_dict())
        second.on_fit_start(run := fake_run(start=20))
        assert (run.stop_reason is not None) == stopped


def test_a_second_run_starts_afresh():
    callback = EarlyStopping("eval/loss", patience=1)
    callback.load_state_dict({"best": 0.5, "best_step": 10, "waited": 0, "observed": True})
    assert observe(callback, [0.75]) == 10
    assert observe(callback, [1.0, 2.0]) == 20
    assert observe(callback, [1.0, 0.5]) is None


@pytest.mark.parametrize("cuts", [[10, 20, 30], [3, 10, 17, 20, 29, 30]])
def test_training_metric_is_observed_at_absolute_steps(cuts):
    # Worse at every step, but for the step 13, which is nobody's business.
    losses = np.arange(1.0, 31.0)
    losses[12] = 0.0
    callback = EarlyStopping("loss", patience=1, every=10)
    attach([callback])
    run = fake_run(callback)
    callback.on_fit_start(run)
    start = 0
    for stop in cuts:
        run.step = stop
        callback.on_chunk_end(
            run, {"step": np.arange(start + 1, stop + 1), "loss": losses[start:stop]}
        )
        run.log({"loss": -100.0})
        if stop % 10 == 0:
            callback.on_step_end(run)
        if run.stop_reason is not None:
            break
        start = stop
    assert run.step == 20


def test_warns_if_there_was_nothing_to_observe():
    callback = EarlyStopping("eval/los", patience=1, mode="min")
    run = fake_run(callback)
    observe(callback, [1.0], run=run)
    with pytest.warns(UserWarning, match=r"eval/los'.*\['eval/loss'\]"):
        callback.on_fit_end(run)
    callback = EarlyStopping("eval/loss", patience=1)
    observe(callback, [1.0], run=fake_run(callback))
    callback.on_fit_end(run)


def test_wrong_arguments_and_names():
    for kwargs in ({"patience": 0}, {"mode": "up"}, {"min_delta": -1.0}, {"every": 0}):
        with pytest.raises(Exception, match=next(iter(kwargs))):
            EarlyStopping("loss", **{"patience": 1, **kwargs})
    callback = EarlyStopping("los", patience=1, mode="min", every=5)
    callback.on_fit_start(run := fake_run())
    with pytest.raises(KeyError, match="one of"):
        callback.on_chunk_end(run, {"step": np.arange(1), "loss": np.ones(1)})
    callback = EarlyStopping("eval/loss", patience=1)
    with pytest.raises(TypeError, match="image"):
        observe(callback, [Image(np.zeros((1, 1, 3), np.uint8))])
