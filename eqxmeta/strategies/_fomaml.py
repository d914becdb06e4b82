import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._inner_loop import Adaptation, InnerLoop
from .._strategy import GradientStrategy
from .._support_statistics import with_support_statistics
from .._task_chunk import TaskChunk
from .._types import Loss
from ._arguments import check_arguments


class FOMAML(GradientStrategy):
    """First-order MAML: MAML whose inner gradients count as constants.

    The meta-gradient is the query loss's gradient at the adapted parameters, and nothing of the
    inner loop is kept for it: Finn, Abbeel, Levine 2017 (arXiv 1703.03400), section 5.2.
    Arguments as for `MAML`; whatever `inner.gradient` says, `"first_order"` is used.
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
        check_arguments("FOMAML", loss, inner, optimizer, task_chunk)
        self.loss = loss
        self.inner = InnerLoop(inner.optimizer, inner.steps, "first_order")
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
