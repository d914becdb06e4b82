"""`InnerLoop(adapt=)` of a part that is not the user's: one that the strategy makes."""

import equinox as eqx
import jax.numpy as jnp
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringModel, boring_fit, same_bits

SGD = optax.sgd(0.1)


class WithContext(eqx.Module):
    model: eqx.Module
    context: Array

    def __call__(self, x):
        return self.model(x) + self.context


class Contextual(em.GradientStrategy, em.RolloutStrategy):
    """A context that begins at zero in every task is all that adapts."""

    loss: em.Loss
    inner: em.InnerLoop
    optimizer: optax.GradientTransformation
    whole: bool = False

    def meta_model(self, model):
        return WithContext(model, jnp.zeros(1)) if self.whole else model

    def inner_rollout(self, model, support, **options):
        held = model if self.whole else WithContext(model, jnp.zeros(1))
        return self.inner(self.loss, held, support, **options)


def contextual(adapt, learnt=False):
    return Contextual(em.losses.mse, em.InnerLoop(SGD, 1, adapt=adapt), SGD, learnt)


@pytest.mark.parametrize(
    ("learnt", "told"), [(True, "context"), (False, "a part that the strategy makes")]
)
def test_it_is_named_where_it_has_a_name_and_runs(learnt, told, capsys, tmp_path):
    def fit(steps, **options):
        return boring_fit(
            steps,
            strategy=contextual(lambda m: m.context, learnt),
            callbacks=[Checkpoint(tmp_path, every=1)],
            **options,
        )

    first = fit(1, summary=True)
    assert f"\nadapts      {told}\n" in capsys.readouterr().out
    assert not jnp.all((first.model.model if learnt else first.model).weight == 0)
    # The same run goes on.
    resumed = fit(2, resume="auto")
    assert int(resumed.step) == 2 and not same_bits(resumed.model, first.model)


def test_what_neither_has_is_still_refused():
    with pytest.raises(AttributeError) as error:
        boring_fit(1, strategy=contextual(lambda m: m.contxt), model=BoringModel())
    assert "`InnerLoop(adapt=...)`" in "".join(error.value.__notes__)
