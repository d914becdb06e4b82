"""A run without a trainer, for the tests of callbacks."""

import numpy as np

from eqxmeta._callback.run import Run


def fake_run(*callbacks, start=0, steps=40, resuming=False, strategy=None, state=None, config=None):
    """A run of which `callbacks` hear what is published."""

    def publish(scalars):
        for callback in callbacks:
            callback.on_log(run, scalars)

    run = Run(
        strategy=strategy,
        steps=steps,
        start=start,
        resuming=resuming,
        config={"seed": 0, "meta_batch_size": 25} if config is None else config,
        snapshot=lambda: state,
        publish=publish,
        callback_states=dict,
    )
    return run


def chunk(run, callback, first, last, **metrics):
    """Deliver steps `first` to `last`; the metric `loss` is a function of the step."""
    step = np.arange(first, last + 1)
    run.step = last
    callback.on_chunk_end(run, {"step": step, "loss": loss(step), **metrics})


def loss(step):
    return (1 / np.asarray(step)).astype(np.float32)
