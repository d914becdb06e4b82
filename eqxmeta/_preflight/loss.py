"""What a loss is given and must return, found by tracing shapes, with labels as they are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._errors import add_note, explain, tracing
from .._model.predict import predict
from .._strategy.metrics import SKIPPED
from .._strategy.strategy import Strategy
from .._task.task import Task, shapes_of


def with_labels(tasks: Any, task: Task) -> Task:
    """The shapes `task` of what `tasks.sample` returns, with values where there are labels: one
    integer an example. Nothing else is computed."""
    if not any(map(is_labels, jax.tree.leaves(task))):
        return task
    return eqx.combine(_sampled_labels(tasks), task)


@eqx.filter_jit
def _sampled_labels(tasks: Any) -> Task:
    return eqx.filter(tasks.sample(jax.random.key(0)), is_labels)


def is_labels(x: Any) -> bool:
    """Whether an array of a task, or its shape, is one integer an example."""
    return x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.integer)


def check_labels(strategy: Strategy, model: PyTree, tasks: Any, task: Task) -> None:
    """Raises what the loss raises of labels that it knows, before anything is compiled. Of a source
    these are one task's, of a batch the smallest and the largest. `task`: the shapes of one."""
    known = _with_extremes(tasks, task) if isinstance(tasks, Task) else [with_labels(tasks, task)]
    for one in known:
        if any(map(eqx.is_array, jax.tree.leaves(one))):
            check_loss(strategy, model, one)


def _with_extremes(tasks: Task, task: Task) -> list[Task]:
    """Those tasks of a batch: their labels as arrays, of all else the shapes."""
    indices: set[int] = set()
    for x, shape in zip(jax.tree.leaves(tasks), jax.tree.leaves(task), strict=True):
        if is_labels(shape) and x.size:
            labels = np.asarray(x)
            indices |= {int(labels.min(axis=1).argmin()), int(labels.max(axis=1).argmax())}

    def one(index: int) -> Task:
        return jax.tree.map(
            lambda x, shape: jnp.asarray(x[index]) if is_labels(shape) else shape, tasks, task
        )

    return [one(index) for index in sorted(indices)]


def check_loss(strategy: Strategy, model: PyTree, task: Task) -> None:
    """`strategy.loss`, if there is one, must return a scalar and a dict of scalars.

    `model` is what `TrainState.model` holds; `task` are the shapes of one, and arrays where values
    are known, which the losses of this library compare with the model's outputs."""
    loss = getattr(strategy, "loss", None)
    if loss is None:
        return

    what = "`loss(model, batch, key)`"
    known, unknown = eqx.partition(task, eqx.is_array)

    def predictor_of(model: PyTree, support: PyTree) -> Any:
        before = strategy.unadapted(model)
        if before is not None:
            return before
        return strategy.inner_adapt(model, support, key=jax.random.key(0))

    def of_task(model: PyTree, unknown: Task) -> Any:
        task = eqx.combine(known, unknown)
        predictor = predictor_of(model, task.support)
        out = loss(predictor, task.support, jax.random.key(0))
        alike = jax.tree.structure(task.query) == jax.tree.structure(task.support)
        if alike and jax.tree.leaves(known.query):  # labels, maybe others than the support has
            with tracing(what, f"{type(model).__name__}, and a batch of {shapes_of(task.query)}"):
                loss(predictor, task.query, jax.random.key(0))
        return out

    with tracing(what, f"{type(model).__name__}, and a batch of {shapes_of(task.support)}"):
        try:
            out = eqx.filter_eval_shape(of_task, model, unknown)
        except Exception as error:
            _note_refusal(error, predictor_of, model, task.support, what)
            raise
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise TypeError(
            explain(
                f"{what} returned something else than a pair.",
                show(out),
                "(scalar, dict of scalar metrics)",
            )
        )
    value, metrics = out
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            explain(
                f"The first value of {what} is not a loss.",
                show(value),
                "a floating-point scalar: a mean over examples",
            )
        )
    check_scalars(metrics, f"The metrics of {what}")


def _note_refusal(
    error: Exception, predictor_of: Any, model: PyTree, support: PyTree, what: str
) -> None:
    """Where the loss failed: say so if it did because the model does not take an example."""
    if not (isinstance(support, tuple | list) and len(support) == 2):
        return

    def of_one(model: PyTree, support: PyTree) -> None:
        predict(predictor_of(model, support), support[0], jax.random.key(0))

    try:
        eqx.filter_eval_shape(of_one, model, support)
    except Exception:  # whatever it is: `error` is what is raised, and this only says where from
        example = shapes_of(jax.tree.map(_without_first_axis, support[0]))
        add_note(
            error,
            f"The model refused one example. (The error came out of {what}.)",
            f"{type(model).__name__}, and an example of shape {example}, of a batch of "
            f"{shapes_of(support)}",
            "a model that JAX can trace for one such example, without a batch axis",
        )


def _without_first_axis(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def check_scalars(metrics: dict[Any, Any], what: str) -> None:
    for name, value in metrics.items():
        if not isinstance(name, str) or getattr(value, "shape", None) != ():
            raise ValueError(
                explain(
                    f"{what} are invalid.",
                    f"{name!r}: {show(value)}",
                    "scalar arrays under string names",
                )
            )
    for name in {"step", SKIPPED} & metrics.keys():
        raise ValueError(explain(f"{what} use a reserved name.", repr(name), "another name"))


def show(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype.name}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text[:200]}"
