"""Meta-SGD: MAML with a learnt rate for every parameter."""

import math
import numbers
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._arguments import check_argument
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.state import MetaParameters, meta_parameters
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.rollout_strategy import RolloutStrategy
from .._types import Loss


def _check_rate(rate: Any) -> float:
    sound = isinstance(rate, numbers.Real) and not isinstance(rate, bool) and math.isfinite(rate)
    check_argument(sound, rate, "MetaSGD(rate=...)", "a finite number")
    return float(rate)


class MetaSGD(GradientStrategy, RolloutStrategy):
    """Meta-SGD: MAML that also learns an inner rate for every parameter.

    Li, Zhou, Chen, Li 2017 (arXiv 1707.09835), equation 2 and algorithm 1: an inner step is
    `θ ← θ - α ∘ ∇loss(θ; support)`, and the outer step descends the query loss after it in θ and
    in α, with one optimizer. α is a meta-parameter as it is, of either sign.

    Here α multiplies the updates of `inner.optimizer`, any optax transformation:
    `InnerLoop(optax.sgd(1.0), steps=1)` is the paper's rule, and `rate` then the initial α. (The
    paper starts with one random number for all rates, between 0.005 and 0.1.) With the default
    `rate=1.0` training starts as MAML with the same `inner`.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, α, a tree like
    it with a rate for every number that adapts and `None` elsewhere: checkpointed with
    it, and drawn by `eqxmeta.callbacks.Histograms`.

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`. Every rate is learnt;
      `learn=lambda m: ()` learns nothing else.
    - `rate`: what every rate is at first.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    rate: float = eqx.field(default=1.0, kw_only=True, converter=_check_rate)

    def meta_model(self, model: PyTree) -> MetaParameters:
        fast, _ = self.inner.partition(model)
        return MetaParameters(model, jax.tree.map(lambda x: jnp.full_like(x, self.rate), fast))

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        learnt = meta_parameters(model, "MetaSGD")
        rated = optax.chain(self.inner.optimizer, _times(learnt.extra))
        return self.inner(self.loss, learnt.model, support, optimizer=rated, **options)


def _times(rates: PyTree) -> optax.GradientTransformation:
    def init(params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None):
        return jax.tree.map(lambda rate, update: rate * update, rates, updates), state

    return optax.GradientTransformation(init, update)
