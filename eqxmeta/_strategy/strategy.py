"""The base class of strategies: how a model adapts, and how it learns to."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._meta_gradient.select import selection
from .._model.state import TrainState
from .._task.task import Task
from .._types import Metrics

# From a model to parts of it.
Where: TypeAlias = Callable[[Any], PyTree]


class Strategy(eqx.Module):
    """A meta-algorithm: how a model adapts to a task, and how it learns to from many tasks.

    Every strategy works without a `Trainer`:

        state = strategy.init(model)
        state, metrics = strategy.outer_update(state, tasks, key=key)
        adapted = strategy.inner_adapt(state.model, support)

    To write your own, subclass `GradientStrategy` if the outer step descends a gradient of the
    query loss, this class otherwise. Decorate both methods with `eqx.filter_jit`.

    `learn`: what is meta-learnt, a function from the user's model to those of its parts that are:
    `lambda m: m.layers[-1]`, or all but one part, `lambda m: eqx.tree_at(lambda m: m.body, m,
    None)`. What is outside has no outer gradient, no state of the outer optimizer and no weight
    decay: it stays as it is, to the bit, though it may adapt (`InnerLoop(adapt=)` says what does).
    `lambda m: ()` is nothing of the model, where the strategy learns something else. `None`: every
    inexact array.

    Raises `TypeError` for a `learn` that is not a function, and `ValueError` when used with a model
    of which it chooses nothing.
    """

    learn: Where | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        sound = self.learn is None or (callable(self.learn) and not isinstance(self.learn, type))
        expected = "a function from the model to what is learnt: `lambda m: m.layers[-1]`; or None"
        argument = f"{type(self).__name__}(learn=...)"
        check_argument(sound, self.learn, argument, expected, TypeError)

    def learnt(self, model: PyTree) -> PyTree:
        """Which leaves of `model`, what `TrainState.model` holds, are meta-learnt: a tree of bools.
        These are what `learn` chooses of the user's own model, and every inexact array beside it.

        A strategy may narrow this. One with an `outer_update` of its own follows it by
        `eqxmeta.partition_learnt`, one that wraps another strategy gives that one's answer.
        """
        if self.learn is None:
            return jax.tree.map(eqx.is_inexact_array, model)

        def own(model: PyTree) -> PyTree:
            unadapted = self.unadapted(model)
            return model if unadapted is None else unadapted

        return selection(model, self.learn, f"{type(self).__name__}(learn=...)", of=own)

    @abc.abstractmethod
    def init(self, model: PyTree) -> TrainState:
        """State before the first outer step, for the user's `model`."""

    @abc.abstractmethod
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        """A model of the user's own type, adapted to one task's `support` examples.

        `model` is what `TrainState.model` holds; `key` is for dropout.
        """

    def unadapted(self, model: PyTree) -> PyTree | None:
        """The model as it is before it adapts, of the user's own type: what step 0 of an evaluation
        and `loss_before` measure. `None` if there is nothing that predicts before it has adapted.

        `model` is what `TrainState.model` holds. A strategy for which that is not the user's own
        model, from which tasks start, says here what is.
        """
        return model

    @abc.abstractmethod
    def outer_update(
        self, state: TrainState, tasks: Task, *, key: PRNGKeyArray | None
    ) -> tuple[TrainState, Metrics]:
        """One outer step on a batch of tasks (leading axis: tasks), and scalar metrics of it."""


def partition_learnt(strategy: Strategy, model: PyTree) -> tuple[PyTree, PyTree]:
    """`(params, rest)`, which `eqx.combine` puts together: the leaves of `model`, what
    `TrainState.model` holds, that `strategy` learns, and all others.

    For an `outer_update` of your own: it differentiates in, keeps optimizer state for and changes
    `params` alone.
    """
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    params, held = eqx.partition(params, strategy.learnt(model))
    return params, eqx.combine(held, rest)


def can_roll_out(strategy: Strategy) -> bool:
    """Whether the strategy's `inner_rollout`, if it has one, does what its `inner_adapt` does.

    `inner_rollout(model, support, *, key=None, steps=None, observe=None) -> Adaptation` is the
    optional method by which a strategy shows its inner steps as it takes them. A subclass that
    replaces `inner_adapt` alone has made the inherited one wrong.
    """
    for cls in type(strategy).__mro__:
        if "inner_rollout" in vars(cls):
            return True
        if "inner_adapt" in vars(cls):
            return False
    return False
