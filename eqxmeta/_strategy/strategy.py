"""The base class of strategies: how a model adapts, and how it learns to."""

import abc

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree

from .._model.state import TrainState
from .._task.task import Task
from .._types import Metrics


class Strategy(eqx.Module):
    """A meta-algorithm: how a model adapts to a task, and how it learns to from many tasks.

    Every strategy works without a `Trainer`:

        state = strategy.init(model)
        state, metrics = strategy.outer_update(state, tasks, key=key)
        adapted = strategy.inner_adapt(state.model, support)

    To write your own, subclass `GradientStrategy` if the outer step descends a gradient of the
    query loss, this class otherwise. Decorate both methods with `eqx.filter_jit`.
    """

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
