"""The trainer warns, once, of convolutions that its loop makes slow, and names what to do."""

import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Callback


class Images(eqx.Module):
    size: int

    def sample(self, key):
        x = jax.random.normal(key, (4, 1, self.size, self.size))
        return em.Task((x, jnp.zeros(4, jnp.int32)), (x, jnp.zeros(4, jnp.int32)))


class Begun(Exception):
    pass


class Only(Callback):
    """Ends a run where its first step would be compiled: by then it has been warned of."""

    def on_fit_start(self, run):
        raise Begun


def begin(model, size):
    strategy = em.FOMAML(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=False, callbacks=[Only()])
    with pytest.raises(Begun):
        trainer.fit(model, Images(size), 2)


def model(channels, size):
    keys = jax.random.split(jax.random.key(0))
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, channels, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(channels, 2, size, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
        ]
    )


def test_a_warning_names_the_line_and_the_line_silences_it():
    slow = model(32, 28)
    with pytest.warns(RuntimeWarning, match=r"model = eqxmeta\.nn\.fast\(model\)") as caught:
        begin(slow, 28)
    (place,) = [Path(warning.filename) for warning in caught]
    assert Path(em.__file__).parent not in place.parents
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(em.nn.fast(slow), 28)


def test_no_word_of_small_ones():
    begin(model(1, 4), 4)
