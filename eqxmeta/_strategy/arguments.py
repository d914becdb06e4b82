"""Checks of the arguments of strategies."""

import optax

from .._arguments import check_argument, check_optimizer
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
    argument = f"{strategy}(inner=...)"
    expected = "an `eqxmeta.InnerLoop`, for example `InnerLoop(optax.sgd(0.01), steps=1)`"
    check_argument(isinstance(inner, InnerLoop), inner, argument, expected, TypeError)


def check_loss_and_optimizer(
    strategy: str, loss: Loss, optimizer: optax.GradientTransformation, task_chunk: TaskChunk
) -> None:
    """The arguments that all built-in strategies share."""
    sound = callable(loss) and not isinstance(loss, type)
    expected = "`loss(model, batch, key) -> (scalar, metrics)`, such as `eqxmeta.losses.mse`"
    check_argument(sound, loss, f"{strategy}(loss=...)", expected, TypeError)
    check_optimizer(optimizer, f"{strategy}(optimizer=...)")
    check_task_chunk(task_chunk, f"{strategy}(task_chunk=...)")
