"""What the figures of an adaptation and of what is confused have in common."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_int, check_seed
from .._errors import annotate_errors, explain
from .._model.predict import predict
from .._model.support_statistics import fill_statistics
from .._strategy.strategy import Strategy
from .._task.device_source import check_device_source
from .._task.task import Task, shapes_of
from .evaluate import with_inner_steps

INK, FAINT = "#333333", "#8a8a8a"

# What is expected of a strategy, or of the argument, where the number of inner steps is chosen.
ONE_FOR_EACH = "a strategy that has one, to be drawn after each number of steps"
FREE = "inner_steps=None"


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


def with_num_inner_steps(strategy: Strategy, steps: int, expected: str) -> Strategy:
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


def adapted_predictions(
    strategy: Strategy, model: PyTree, support: PyTree, x: PyTree, key: PRNGKeyArray
) -> Array:
    """Of the model adapted to `support` (with dropout, of which `key` is the key), for each example
    of `x: [n, ...]`, without dropout."""
    adapted = strategy.inner_adapt(model, support, key=key)
    # Strategies that need not have a loss for it: only asked for if there are such layers.
    adapted = fill_statistics(adapted, lambda m: strategy.loss(m, support, key))  # pyright: ignore
    return predict(eqx.nn.inference_mode(adapted), x)


def check_predictions(
    strategy: Strategy, model: PyTree, tasks: Any, caller: str
) -> tuple[tuple[int, ...], int]:
    """The shape of what `adapted_predictions` gives for the queries of such a task, and their
    number. Nothing is compiled. Raises whatever the user's own code does."""
    task = check_device_source(tasks, f"{caller}(tasks=...)")
    x, *_ = task.query

    def predictions(model: PyTree, support: PyTree, x: PyTree) -> Array:
        return adapted_predictions(strategy, model, support, x, jax.random.key(0))

    received = f"{type(model).__name__}, support {shapes_of(task.support)}, queries {shapes_of(x)}"
    with annotate_errors(f"`{caller}`, of `inner_adapt(model, support)` and its model", received):
        return eqx.filter_eval_shape(predictions, model, task.support, x).shape, len(x)
