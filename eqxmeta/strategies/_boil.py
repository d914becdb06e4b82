"""BOIL: the inner loop adapts the body only."""

import equinox as eqx
import optax

from .._meta_gradient.inner_loop import InnerLoop
from .._strategy.by_inner_loop import ByInnerLoop
from .._strategy.head import Body, Head, Where, adapting, check_head
from .._strategy.strategy import GradientStrategy
from .._task.layout import TaskChunk
from .._types import Loss


class BOIL(GradientStrategy, ByInnerLoop):
    """Body only update in the inner loop: MAML in which all but the head adapts.

    Oh, Yoo, Kim, Yun 2021 (arXiv 2008.08882), section 3: the inner learning rate of the head is
    zero, `body ← body - α ∇_body loss(body, head; support)`, and the outer step descends
    `loss(body_K, head; query)` in both.

    Arguments as for `ANIL`.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    task_chunk: TaskChunk = eqx.field(default="auto", kw_only=True)

    def __init__(
        self,
        loss: Loss,
        inner: InnerLoop,
        optimizer: optax.GradientTransformation,
        *,
        head: Where | None = None,
        task_chunk: TaskChunk = "auto",
    ):
        check_head(head, "BOIL(head=...)")
        self.loss = loss
        self.inner = adapting(inner, Body(Head(head, "BOIL(head=...)")), "BOIL")
        self.optimizer = optimizer
        self.task_chunk = task_chunk
