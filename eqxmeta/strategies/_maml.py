import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._inner_loop import Adaptation, InnerLoop
from .._strategy import GradientStrategy
from .._support_statistics import with_support_statistics
from .._task_chunk import TaskChunk
from .._types import Loss
from ._arguments import check_arguments


class MAML(GradientStrategy):
    """Model-agnostic meta-learning: an initialisation from which `inner` adapts well.

    Descends, with `optimizer`, the gradient in θ of the mean over tasks of
    `loss(inner(θ, support), query)`, through every inner step: Finn, Abbeel, Levine 2017
    (arXiv 1703.03400), algorithm 1 and equation 1.

    - `loss(model, batch, key) -> (scalar, metrics)`, for example `eqxmeta.losses.mse`.
    - `inner`: an `InnerLoop`, whose `gradient` is the mode of the meta-gradient.
    - `optimizer`: the outer optax optimizer.
    - `task_chunk`: how many tasks are computed at a time, see `GradientStrategy`.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation

    def __init__(
        self,
        loss: Loss,
        inner: InnerLoop,
        optimizer: optax.GradientTransformation,
        *,
        task_chunk: TaskChunk = "auto",
    ):
        check_arguments("MAML", loss, inner, optimizer, task_chunk)
        self.loss = loss
        self.inner = inner
        self.optimizer = optimizer
        self.task_chunk = task_chunk

    @eqx.filter_jit
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        adapted = self.inner_rollout(model, support, key=key).model
        return with_support_statistics(self.loss, adapted, support, key=key)

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        return self.inner(self.loss, model, support, **options)
