"""The trainer names `em.nn.fast` once: a warning for convolutions, else a line of the summary."""

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


def begin(model, size, summary=False):
    strategy = em.FOMAML(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=summary, callbacks=[Only()])
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


class Flat(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, x):
        return self.net(jnp.ravel(x))


def test_the_summary_names_it_for_linear_layers(capsys):
    plain = Flat(eqx.nn.MLP(16, 2, 4, 1, key=jax.random.key(0)))
    begin(plain, 4, summary=True)
    assert "em.nn.fast(model), for 2 `eqx.nn.Linear`" in capsys.readouterr().out
    begin(em.nn.fast(plain), 4, summary=True)
    assert "em.nn.fast" not in capsys.readouterr().out


def test_where_the_warning_has_named_it_the_summary_does_not(capsys):
    slow = eqx.nn.Sequential([*model(32, 28).layers, eqx.nn.Linear(2, 2, key=jax.random.key(0))])
    with pytest.warns(RuntimeWarning, match="fast"):
        begin(slow, 28, summary=True)
    assert "em.nn.fast" not in capsys.readouterr().out
