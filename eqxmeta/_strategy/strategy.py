"""The base class of strategies: how a model adapts, and how it learns to."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._errors import explain
from .._meta_gradient.select import selection
from .._model.state import TrainState, own_model
from .._model.support_statistics import fill_statistics
from .._task.task import Task
from .._types import Loss, Metrics

# From a model to parts of it.
Where: TypeAlias = Callable[[Any], PyTree]


class Strategy(eqx.Module):
    """A meta-algorithm: how a model adapts to a task, and how it learns to from many tasks.

    Every strategy works without a `Trainer`:

        state = strategy.init(model)
        state, metrics = strategy.outer_update(state, tasks, key=key)
        adapted = strategy.inner_adapt(state.model, support)

    To write your own, subclass `GradientStrategy` if the outer step descends an objective of the
    tasks, `RolloutStrategy` if the model adapts by an `InnerLoop`, both (as `MAML` does), or this
    class alone. In the signatures below `model` is always what `TrainState.model` holds. Decorate
    `inner_adapt` and `outer_update` with `eqx.filter_jit`.

    `loss(model, batch, key) -> (scalar, metrics)`: what `evaluate` measures on the query set, a
    field or a method.

    `learn`: what is meta-learnt, a function from the user's model to those of its parts that are:
    `lambda m: m.layers[-1]`, or all but one part, `lambda m: eqx.tree_at(lambda m: m.body, m,
    None)`. What is outside has no outer gradient, no state of the outer optimizer and no weight
    decay: it stays as it is, to the bit, though it may adapt (`InnerLoop(adapt=)` says what does).
    `lambda m: ()` is nothing of the model, where the strategy learns something else. `None`: every
    inexact array.

    Raises `TypeError` for a `learn` that is not a function, and `ValueError` when used with a model
    of which it chooses nothing.
    """

    loss: eqx.AbstractVar[Loss]
    learn: Where | None = eqx.field(default=None, kw_only=True)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # By its name: the class is made above here.
        rolls_out = any(base.__name__ == "RolloutStrategy" for base in cls.__mro__)
        if "inner_rollout" in vars(cls) and not rolls_out:
            message = f"`{cls.__name__}.inner_rollout` would not be used."
            received = f"a subclass of {', '.join(base.__name__ for base in cls.__bases__)}"
            raise TypeError(explain(message, received, "a subclass of `eqxmeta.RolloutStrategy`"))

    def __check_init__(self):
        name = type(self).__name__
        sound = callable(self.loss) and not isinstance(self.loss, type)
        expected = "`loss(model, batch, key) -> (scalar, metrics)`, such as `eqxmeta.losses.mse`"
        check_argument(sound, self.loss, f"{name}(loss=...)", expected, TypeError)
        sound = self.learn is None or (callable(self.learn) and not isinstance(self.learn, type))
        expected = "a function from the model to what is learnt: `lambda m: m.layers[-1]`; or None"
        check_argument(sound, self.learn, f"{name}(learn=...)", expected, TypeError)

    def learnt(self, model: PyTree) -> PyTree:
        """Which leaves of `model`, what `TrainState.model` holds, are meta-learnt: a tree of bools.
        These are what `learn` chooses of the user's own model, and every inexact array beside it
        (in `MetaParameters`).

        A strategy may narrow this. One with an `outer_update` of its own follows it by
        `eqxmeta.partition_learnt`, one that wraps another strategy gives that one's answer.
        """
        if self.learn is None:
            return jax.tree.map(eqx.is_inexact_array, model)
        return selection(model, self.learn, f"{type(self).__name__}(learn=...)", of=own_model)

    @abc.abstractmethod
    def init(self, model: PyTree) -> TrainState:
        """State before the first outer step, for the user's `model`."""

    @abc.abstractmethod
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        """What predicts, one example to one output, adapted to one task's `support` examples:
        mostly a model of the user's own type. `key` is for dropout."""

    def unadapted(self, model: PyTree) -> PyTree | None:
        """What predicts before it has adapted, which `loss_before` measures: by default the user's
        own model. `None` if nothing does."""
        return own_model(model)

    def num_inner_steps(self) -> int | None:
        """How many inner steps an evaluation measures if it is not told; `None`: it measures before
        and after."""
        return None

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


def adapted_model(
    strategy: Strategy, model: PyTree, support: PyTree, key: PRNGKeyArray | None
) -> PyTree:
    """`model` adapted to `support`, with dropout, of which `key` is the key; what comes back
    predicts without, by the statistics of the support set."""
    adapted = strategy.inner_adapt(model, support, key=key)
    # Strategies that need not have a loss for it: only asked for if there are such layers.
    adapted = fill_statistics(adapted, lambda m: strategy.loss(m, support, key))  # pyright: ignore
    return eqx.nn.inference_mode(adapted)
