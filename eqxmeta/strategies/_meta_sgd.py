"""Meta-SGD: MAML with a learnt rate for every parameter."""

from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._arguments import check_number
from .._strategy.learnt_rule import AdaptsByRule
from .._types import Number
from ..rules import Rates


def _check_rate(rate: Any) -> Number:
    return check_number(rate, "MetaSGD(rate=...)")


class MetaSGD(AdaptsByRule):
    """Meta-SGD: MAML that also learns an inner rate for every parameter.

    Li, Zhou, Chen, Li 2017 (arXiv 1707.09835), equation 2 and algorithm 1: an inner step is
    `θ ← θ - α ∘ ∇loss(θ; support)`, and the outer step descends the query loss after it in θ and
    in α, with one optimizer. α is a meta-parameter as it is, of either sign.

    Here α multiplies the updates of `inner.optimizer`, any optax transformation:
    `InnerLoop(optax.sgd(1.0), steps=1)` is the paper's rule, and `rate` then the initial α. (The
    paper starts with one random number for all rates, between 0.005 and 0.1.) With the default
    `rate=1.0` training starts as MAML with the same `inner`.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, an
    `eqxmeta.rules.Rates`: its `rates` are α, a tree like the model with a rate for every number
    that adapts and `None` elsewhere. They are checkpointed with it, and drawn by
    `eqxmeta.callbacks.Histograms`.

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`. Every rate is learnt;
      `learn=lambda m: ()` learns nothing else.
    - `rate`: what every rate is at first.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    rate: Number = eqx.field(default=1.0, kw_only=True, converter=_check_rate)

    def new_rule(self, params: PyTree) -> Rates:
        return Rates(params, self.rate)
