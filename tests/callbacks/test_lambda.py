import numpy as np
import pytest

from eqxmeta._callback.callback import HOOKS, attach
from eqxmeta.callbacks import Lambda

from ..fake_run import fake_run

ARGUMENTS = {
    "on_chunk_end": ({"step": np.arange(1)},),
    "on_log": ({},),
    "on_exception": (KeyError(),),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_calls_its_function(hook):
    calls = []

    def one(run):
        calls.append((run,))

    def two(run, more):
        calls.append((run, more))

    every = 5 if hook == "on_step_end" else None
    callback = Lambda(every=every, **{hook: two if hook in ARGUMENTS else one})
    attach([callback])
    assert callback.every == every
    run = fake_run()
    for name in HOOKS:
        getattr(callback, name)(run, *ARGUMENTS.get(name, ()))
    assert calls == [(run, *ARGUMENTS.get(hook, ()))]


def test_wrong_signature_is_an_error_when_attached():
    with pytest.raises(TypeError, match="signature"):
        attach([Lambda(on_log=lambda run: None)])  # pyright: ignore
    with pytest.raises(TypeError, match=r"signature(.|\n)*on_log=5, not a method"):
        attach([Lambda(on_log=5)])  # pyright: ignore


def test_two_need_names():
    lambdas = [Lambda(on_fit_end=print), Lambda(on_fit_end=print, name="second")]
    assert len(attach(lambdas)) == 2
    with pytest.raises(ValueError, match="name"):
        attach([lambdas[0], Lambda(on_fit_end=print)])


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({}, "nothing"),
        ({"every": 5, "on_log": print}, "without the other"),
        ({"on_step_end": print}, "without the other"),
        ({"on_step_end": print, "every": 0}, "every"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Lambda(**kwargs)
