"""What the figures of an adaptation and of what is confused have in common."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from ._arguments import check_int, check_seed
from ._errors import explain
from ._evaluate import with_inner_steps
from ._predict import predict
from ._sources import check_device_source
from ._strategy import Strategy
from ._support_statistics import fill_statistics
from ._task import Task

INK, FAINT = "#333333", "#8a8a8a"


def check_figure(tasks: Any, num_tasks: int, seed: int, caller: str) -> tuple[Task, int, int]:
    """The shapes of a task, and the two numbers as Python's own.

    Raises `ImportError` without matplotlib, `TypeError` or `ValueError`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = explain(
            f"`{caller}` cannot draw.", "no matplotlib", "pip install 'eqxmeta[examples]'"
        )
        raise ImportError(message) from error
    num_tasks = check_int(num_tasks, f"{caller}(num_tasks=...)", minimum=1, what="tasks")
    seed = check_seed(seed, f"{caller}(seed=...)")
    return check_device_source(tasks, f"{caller}(tasks=...)"), num_tasks, seed


def taking(strategy: Strategy, steps: int, expected: str) -> Strategy:
    """`strategy` with that many inner steps. Raises `ValueError` if it cannot be told."""
    if not hasattr(getattr(strategy, "inner", None), "steps"):
        raise ValueError(
            explain(
                "`inner_steps` cannot be obeyed.",
                f"`{type(strategy).__name__}`, which has no `InnerLoop` in a field `inner`",
                expected,
            )
        )
    return with_inner_steps(strategy, steps)


def adapted_predictions(strategy: Strategy, model: PyTree, support: PyTree, x: PyTree) -> Array:
    """Of the model adapted to `support`, without dropout, for each example of `x: [n, ...]`."""
    adapted = strategy.inner_adapt(model, support, key=None)
    # Strategies that need not have a loss for it: only asked for if there are such layers.
    adapted = fill_statistics(adapted, lambda m: strategy.loss(m, support, None))  # pyright: ignore
    return predict(eqx.nn.inference_mode(adapted), x)
