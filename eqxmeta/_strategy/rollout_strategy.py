"""The base classes of strategies that adapt by inner steps."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._errors import explain
from .._keys import split_or_none
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.support_statistics import with_support_statistics
from .._task.minibatches import minibatches
from .._types import Loss
from .strategy import Strategy


class RolloutStrategy(Strategy):
    """A strategy that adapts by the inner steps of an `InnerLoop`, its field `inner`.

    A subclass writes `inner_rollout`. `inner_adapt` is where it arrives, with the statistics of the
    support set for the layers that normalise by them; it cannot be written anew, for an evaluation
    measures the model along the way, after every inner step.
    """

    inner: eqx.AbstractVar[InnerLoop]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        writer = next(base for base in cls.__mro__ if "inner_adapt" in vars(base))
        if writer is not RolloutStrategy:
            message = f"`{cls.__name__}.inner_adapt` is written anew: it follows `inner_rollout`."
            received = f"the one of `{writer.__name__}`, in a subclass of `RolloutStrategy`"
            expected = "`inner_rollout(self, model, support, **options)` instead; or a subclass of "
            expected += "`GradientStrategy` alone, which writes `inner_adapt`"
            raise TypeError(explain(message, received, expected))

    def __check_init__(self):
        argument = f"{type(self).__name__}(inner=...)"
        expected = "an `eqxmeta.InnerLoop`, for example `InnerLoop(optax.sgd(0.01), steps=1)`"
        check_argument(isinstance(self.inner, InnerLoop), self.inner, argument, expected, TypeError)

    @abc.abstractmethod
    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        """`model` adapted to `support`, by calls of `self.inner`.

        `options` are those of `InnerLoop.__call__`: `key`, `steps`, `observe`, `gradient`,
        `opt_state`, which are passed on. After more steps than were trained with, whatever is
        learnt for each step goes on as at the last. `observe` is given what predicts: what is
        observed first is column 0 of an evaluation.
        """

    @eqx.filter_jit
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        adapted = self.inner_rollout(model, support, key=key).model
        return with_support_statistics(self.loss, adapted, support, key=key)

    def num_inner_steps(self) -> int:
        return self.inner.steps


class ByInnerLoop(RolloutStrategy):
    """Adapts by the loop `inner`, as it is, on `loss`."""

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        return self.inner(self.loss, model, support, **options)


def on_minibatches(
    inner: InnerLoop,
    loss: Loss,
    model: PyTree,
    data: PyTree,
    batch_size: int | None,
    *,
    key: PRNGKeyArray | None = None,
    steps: int | None = None,
    start: int = 0,
    **options,
) -> Adaptation:
    """A call of `inner` in which each step sees `batch_size` examples of `data`; see
    `minibatches`."""
    steps = inner.steps if steps is None else steps
    batch_key, key = split_or_none(key)
    data, rows = minibatches(data, batch_size, start + steps, batch_key)
    rows = None if rows is None else rows[start:]
    return inner(loss, model, data, key=key, steps=steps, minibatches=rows, start=start, **options)


def first_order(inner: Any) -> Any:
    """The same inner loop, whose gradients count as constants."""
    if not isinstance(inner, InnerLoop):  # refused by `__check_init__`
        return inner
    # Nothing of the loop is kept for a backward pass, so that there is nothing to remember either.
    return InnerLoop(inner.optimizer, inner.steps, "first_order", adapt=inner.adapt)
