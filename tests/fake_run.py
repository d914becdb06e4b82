"""A run without a trainer, for the tests of callbacks."""

import math
from types import SimpleNamespace

import numpy as np

from eqxmeta._callback.run import Origin, Run, Settings


def fake_run(*callbacks, start=0, steps=40, resuming=False, strategy=None, state=None, config=None):
    """A run of which `callbacks` hear what is published."""

    def publish(scalars):
        for callback in callbacks:
            callback.on_log(run, scalars)

    config = {"seed": 0, "meta_batch_size": 25} if config is None else config
    run = Run(
        settings(strategy, steps, config),
        Origin(SimpleNamespace(step=start), resuming=resuming),
        state_after=lambda step: state,
        publish=publish,
        callback_states=dict,
        sync_callbacks=lambda: None,
    )
    return run


def settings(strategy, steps, config):
    return Settings(strategy, steps, 0, {}, math.inf, "auto", "raise", config)


def chunk(run, callback, first, last, **metrics):
    """Deliver steps `first` to `last`; the metric `loss` is a function of the step."""
    step = np.arange(first, last + 1)
    run.step = last
    callback.on_chunk_end(run, {"step": step, "loss": loss(step), **metrics})


def loss(step):
    return (1 / np.asarray(step)).astype(np.float32)
