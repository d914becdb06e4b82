"""Learnt updates: MAML with an inner rule that is learnt."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._arguments import check_argument
from .._strategy.learnt_rule import AdaptsByRule


class LearntUpdate(AdaptsByRule):
    """MAML that also learns the rule of its inner steps: `θ ← θ + rule(u)`, where u is the update
    of `inner.optimizer`, minus the gradient with `optax.sgd(1.0)`.

    The outer step descends the query loss after the inner steps in θ and in every floating-point
    array of the rule, with one optimizer and, as in MAML, through all steps.

        rule = lambda params: em.rules.LayerRates(params, steps=5)
        em.LearntUpdate(loss, em.InnerLoop(optax.sgd(0.1), steps=5), adam, rule=rule)
        em.LearntUpdate(loss, inner, adam, rule=lambda params: em.rules.UpdateNetwork(key=key))

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`, `estimator`: as for `MAML`. All of the
      rule is learnt; `learn=lambda m: ()` learns nothing else.
    - `rule`: from what adapts (the model, with `None` for all else) to the rule at the start of
      training: an `eqx.Module` with optax's `init` and `update`, one of `eqxmeta.rules` or of your
      own. Its count of steps is in its state, an array, so that a rule with a row for each step
      says itself what holds after the last: those of `eqxmeta.rules` go on with it.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, the rule.

    Raises `TypeError` for a `rule` that is not such a function.
    """

    rule: Callable[[PyTree], Any] = eqx.field(kw_only=True)

    def __check_init__(self):
        expected = "a function from what adapts to a rule, such as `eqxmeta.rules.KroneckerBlocks`"
        argument = "LearntUpdate(rule=...)"
        check_argument(callable(self.rule), self.rule, argument, expected, TypeError)

    def new_rule(self, params: PyTree) -> Any:
        return self.rule(params)
