"""What the figures of an adaptation and of what is confused have in common."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_int, check_seed
from .._errors import annotate_errors, explain, need
from .._model.predict import predict
from .._strategy.strategy import Strategy, adapted_model
from .._task.device_source import check_device_source
from .._task.examples import has_weights
from .._task.task import shapes_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#333333", "#8a8a8a"


def check_figure(
    tasks: Any,
    num_tasks: int,
    seed: int,
    caller: str,
    *,
    can_draw: Callable[[Any, Any], bool],
    problem: str,
    expected: str,
) -> tuple[int, int]:
    """The two numbers as Python's own. `can_draw(x, y)`: whether examples of these shapes can be
    drawn; `problem` is said of tasks with others.

    Raises `ImportError` without matplotlib, `TypeError` or `ValueError`."""
    need("matplotlib", caller, "examples")
    num_tasks = check_int(num_tasks, f"{caller}(num_tasks=...)", minimum=1, what="tasks")
    seed = check_seed(seed, f"{caller}(seed=...)")
    task = check_device_source(tasks, f"{caller}(tasks=...)")
    for examples in (task.support, task.query):
        leaves = jax.tree.leaves(examples)
        sound = isinstance(examples, tuple) and (len(leaves) == 2 or has_weights(examples))
        if not sound or not can_draw(*leaves[:2]):
            received = f"examples of shapes {[leaf.shape for leaf in leaves]}"
            raise ValueError(explain(f"`{caller}(tasks=...)` {problem}.", received, expected))
    return num_tasks, seed


def new_figure(width: float, height: float) -> "Figure":
    """Of these sizes in inches: no display, and nothing of pyplot's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def without_padding(batch: tuple[Any, ...]) -> tuple[Any, Any]:
    """`(x, y)` of the examples that are there: all, if there are no weights."""
    x, y, *weight = batch
    there = weight[0] > 0 if weight else slice(None)
    return x[there], y[there]


def adapted_predictions(
    strategy: Strategy,
    model: PyTree,
    support: PyTree,
    x: PyTree,
    key: PRNGKeyArray,
    weight: Float[Array, " n"] | None = None,
) -> Array:
    """Of the model adapted to `support` (with dropout, of which `key` is the key), for each example
    of `x: [n, ...]`, without dropout."""
    return predict(adapted_model(strategy, model, support, key), x, None, weight)


def check_predictions(
    strategy: Strategy,
    model: PyTree,
    tasks: Any,
    caller: str,
    can_draw: Callable[[tuple[int, ...], int], bool],
    expected: str,
) -> None:
    """Raises `ValueError` unless what the model predicts for the queries of such a task has a shape
    that can be drawn, `can_draw(shape, queries)`; and what the user's own code raises. Nothing is
    compiled."""
    task = check_device_source(tasks, f"{caller}(tasks=...)")
    x, *_ = task.query

    def predictions(model: PyTree, support: PyTree, x: PyTree) -> Array:
        return adapted_predictions(strategy, model, support, x, jax.random.key(0))

    received = f"{type(model).__name__}, support {shapes_of(task.support)}, queries {shapes_of(x)}"
    with annotate_errors(f"`{caller}`, of `inner_adapt(model, support)` and its model", received):
        shape = eqx.filter_eval_shape(predictions, model, task.support, x).shape
    if not can_draw(shape, len(x)):
        message = f"`{caller}` cannot draw what the model predicts."
        raise ValueError(explain(message, f"{list(shape)} for {len(x)} examples", expected))
