"""Checks of the arguments of strategies."""

import optax

from .._arguments import check_optimizer
from .._errors import explain
from .._meta_gradient.inner_loop import InnerLoop
from .._task.layout import TaskChunk, check_task_chunk
from .._types import Loss


def check_arguments(
    strategy: str,
    loss: Loss,
    inner: InnerLoop,
    optimizer: optax.GradientTransformation,
    task_chunk: TaskChunk,
) -> None:
    """The arguments that the strategies with an inner loop share."""
    check_loss_and_optimizer(strategy, loss, optimizer, task_chunk)
    if not isinstance(inner, InnerLoop):
        raise TypeError(
            explain(
                f"`{strategy}(inner=...)` is not an inner loop.",
                repr(inner),
                "an `eqxmeta.InnerLoop`, for example `InnerLoop(optax.sgd(0.01), steps=1)`",
            )
        )


def check_loss_and_optimizer(
    strategy: str, loss: Loss, optimizer: optax.GradientTransformation, task_chunk: TaskChunk
) -> None:
    """The arguments that all built-in strategies share."""
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            explain(
                f"`{strategy}(loss=...)` is not a loss.",
                repr(loss),
                "`loss(model, batch, key) -> (scalar, metrics)`, such as `eqxmeta.losses.mse`",
            )
        )
    check_optimizer(optimizer, f"{strategy}(optimizer=...)")
    check_task_chunk(task_chunk, f"{strategy}(task_chunk=...)")
