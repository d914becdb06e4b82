"""Strategies whose inner steps follow a rule that is meta-learnt."""

import abc
from typing import Any

import optax
from jaxtyping import PyTree

from .._arguments import check_argument
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.state import MetaParameters, meta_parameters
from .._model.update_of import update_of
from .._types import Loss
from .gradient_strategy import GradientStrategy
from .rollout_strategy import RolloutStrategy


class AdaptsByRule(GradientStrategy, RolloutStrategy):
    """MAML in which a learnt rule has the last word on the updates of `inner.optimizer`. The rule
    is `MetaParameters.extra`."""

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation

    @abc.abstractmethod
    def new_rule(self, params: PyTree) -> Any:
        """The rule before training, for `params`: a tree of what adapts, `None` elsewhere. It has
        optax's `init` and `update`, see `eqxmeta.rules`."""

    def meta_model(self, model: PyTree) -> MetaParameters:
        fast, _ = self.inner.partition(model)
        rule = self.new_rule(fast)
        sound = all(callable(getattr(rule, method, None)) for method in ("init", "update"))
        argument = f"{type(self).__name__}(rule=...)(params)"
        expected = "an `eqx.Module` with `init` and `update`, such as `eqxmeta.rules.Rates(params)`"
        check_argument(sound, rule, argument, expected, TypeError)
        return MetaParameters(model, rule)

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        name = type(self).__name__
        learnt = meta_parameters(model, name)
        ruled = _then(self.inner.optimizer, learnt.extra, f"The rule of `{name}`")
        return self.inner(self.loss, learnt.model, support, optimizer=ruled, **options)


def _then(first: optax.GradientTransformation, rule: Any, name: str) -> Any:
    """As `optax.chain`, of which each part takes `value` or does not."""
    update_first = update_of(first, "`InnerLoop(optimizer=...)`")
    update_last = update_of(optax.GradientTransformation(rule.init, rule.update), name)

    def init(params: PyTree) -> tuple[Any, Any]:
        return first.init(params), rule.init(params)

    def update(updates: PyTree, state: Any, params: Any = None, **extra: Any):
        value = extra["value"]
        updates, before = update_first(updates, state[0], params, value)
        updates, after = update_last(updates, state[1], params, value)
        return updates, (before, after)

    return optax.GradientTransformationExtraArgs(init, update)
