"""What `check_meta_gradient` and `NonFiniteError` advise: that for which a reason was seen."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em

from ..helpers import tiny_mlp

KEY = jax.random.key(0)
MSE = em.losses.mse
INNER = em.InnerLoop(optax.sgd(0.01), 2)


@jax.custom_jvp
def same(x):
    return x


@same.defjvp
def _(primals, tangents):
    return primals[0], jnp.nan * tangents[0]


def check(inner):
    return em.check_meta_gradient(
        em.MAML(MSE, inner, optax.sgd(1.0)), tiny_mlp(), em.tasks.Sinusoid(4, 6).sample(KEY)
    )


def test_not_finite_is_a_verdict_of_its_own():
    """Finite differences are finite, both modes are not: no mode is recommended."""
    broken = optax.stateless(lambda grads, params: jax.tree.map(lambda g: -0.1 * same(g), grads))
    found = check(em.InnerLoop(broken, 2))
    assert not found.ok and found.not_finite == ("mixed", "reverse")
    assert "Not finite: mixed and reverse\nFinite differences are finite here" in str(found)
    assert "use gradient" not in str(found) and "Neither" not in str(found)


@pytest.mark.slow
def test_radam_after_three_steps_is_right():
    found = check(em.InnerLoop(optax.radam(0.01), 5))
    assert found.ok and found.mixed_vs_finite_differences < 1e-5
    assert "use gradient='mixed'" in str(found) and not found.not_finite


class Halves(eqx.Module):
    def sample(self, key):
        task = em.tasks.Sinusoid(4, 6).sample(key)
        return jax.tree.map(lambda x: x.astype(jnp.float16), task)


def fit(outer, inner=INNER, model=None, tasks=None, steps=5):
    trainer = em.Trainer(em.MAML(MSE, inner, outer), meta_batch_size=2, summary=False)
    return trainer.fit(model or tiny_mlp(), tasks or em.tasks.Sinusoid(4, 6), steps)


def test_float16_is_told_of_eps():
    model = jax.tree.map(
        lambda x: x.astype(jnp.float16) if eqx.is_inexact_array(x) else x, tiny_mlp()
    )
    with pytest.raises(em.NonFiniteError, match=r"eps=1e-4") as error:
        fit(optax.adam(1e-3), model=model, tasks=Halves())
    assert error.value.step == 1 and "learning rate" not in str(error.value)
    fit(optax.adam(1e-3, eps=1e-4), model=model, tasks=Halves())  # what is advised helps


def test_a_smaller_rate_is_advised_where_the_loss_has_grown():
    with pytest.raises(em.NonFiniteError, match=r"had grown from .* a smaller learning rate"):
        fit(optax.sgd(1e6), steps=20)


def test_a_gradient_that_is_not_finite_is_no_matter_of_rates():
    broken = optax.stateless(lambda grads, params: jax.tree.map(lambda g: -0.1 * same(g), grads))
    with pytest.raises(em.NonFiniteError, match="check_meta_gradient") as error:
        fit(optax.sgd(0.1), em.InnerLoop(broken, 2))
    assert error.value.name == "grad_norm" and "clipping" not in str(error.value)
