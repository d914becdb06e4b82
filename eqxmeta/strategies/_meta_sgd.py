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
from .._errors import explain
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.holder import HoldsModel
from .._strategy.by_inner_loop import RollsOut
from .._strategy.gradient_strategy import GradientStrategy
from .._task.layout import TaskChunk
from .._types import Loss


class WithRates(HoldsModel):
    """What Meta-SGD learns.

    - `model`: the user's own, from which tasks start.
    - `rates`: a tree like `model` with a rate for every number that adapts, `None` elsewhere.
    """

    model: PyTree
    rates: PyTree


def _check_rate(rate: Any) -> float:
    sound = isinstance(rate, numbers.Real) and not isinstance(rate, bool) and math.isfinite(rate)
    check_argument(sound, rate, "MetaSGD(rate=...)", "a finite number")
    return float(rate)


class MetaSGD(GradientStrategy, RollsOut):
    """Meta-SGD: MAML that also learns an inner rate for every parameter.

    Li, Zhou, Chen, Li 2017 (arXiv 1707.09835), equation 2 and algorithm 1: an inner step is
    `θ ← θ - α ∘ ∇loss(θ; support)`, and the outer step descends the query loss after it in θ and
    in α, with one optimizer. α is a meta-parameter as it is, of either sign.

    Here α multiplies the updates of `inner.optimizer`, any optax transformation:
    `InnerLoop(optax.sgd(1.0), steps=1)` is the paper's rule, and `rate` then the initial α. (The
    paper starts with one random number for all rates, between 0.005 and 0.1.) With the default
    `rate=1.0` training starts as MAML with the same `inner`.

    `TrainState.model` has the fields `model`, the user's own, and `rates`, α: checkpointed with
    it, and drawn by `eqxmeta.callbacks.Histograms`.

    - `loss`, `inner`, `optimizer`, `task_chunk`: as for `MAML`.
    - `rate`: what every rate is at first.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    rate: float = eqx.field(default=1.0, kw_only=True, converter=_check_rate)
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def meta_model(self, model: PyTree) -> WithRates:
        fast, _ = self.inner.partition(model)
        return WithRates(model, jax.tree.map(lambda x: jnp.full_like(x, self.rate), fast))

    def unadapted(self, model: PyTree) -> PyTree:
        return _checked(model).model

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        learnt = _checked(model)
        rated = optax.chain(self.inner.optimizer, _times(learnt.rates))
        inner = eqx.tree_at(lambda inner: inner.optimizer, self.inner, rated, is_leaf=_is_optimizer)
        return inner(self.loss, learnt.model, support, **options)


def _times(rates: PyTree) -> optax.GradientTransformation:
    def init(params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None):
        return jax.tree.map(lambda rate, update: rate * update, rates, updates), state

    return optax.GradientTransformation(init, update)


def _is_optimizer(x: Any) -> bool:
    return isinstance(x, optax.GradientTransformation)


def _checked(model: Any) -> WithRates:
    if not isinstance(model, WithRates):
        message, received = "`model` has no inner rates.", type(model).__name__
        where = "`MetaSGD(...).init(model).model`, or a trained one"
        raise TypeError(explain(message, received, f"what `TrainState.model` holds: {where}"))
    return model
