"""What can be found wrong with a run before anything is compiled: only shapes are traced."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._chunk import SKIPPED
from ._errors import add_note, explain, tracing
from ._predict import predict
from ._slow_convolutions import warn_slow_convolutions
from ._state import TrainState
from ._strategy import Strategy
from ._task import Task, shapes_of


def with_labels(tasks: Any, task: Task) -> Task:
    """The shapes `task` of what `tasks.sample` returns, with values where there are labels: one
    integer an example. Nothing else is computed."""

    def is_labels(x: Any) -> bool:
        return x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.integer)

    if not any(map(is_labels, jax.tree.leaves(task))):
        return task
    sample = eqx.filter_jit(lambda tasks: eqx.filter(tasks.sample(jax.random.key(0)), is_labels))
    return eqx.combine(sample(tasks), task)


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
        return strategy.inner_adapt(model, support) if before is None else before

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
                _show(out),
                "(scalar, dict of scalar metrics)",
            )
        )
    value, metrics = out
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            explain(
                f"The first value of {what} is not a loss.",
                _show(value),
                "a floating-point scalar: a mean over examples",
            )
        )
    _check_scalars(metrics, f"The metrics of {what}")


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


def check_outer_update(strategy: Strategy, state: TrainState, tasks: Task) -> set[str]:
    """`strategy.outer_update` must give back the same kind of state, and scalar metrics, whose
    names are returned."""
    what = f"`{type(strategy).__name__}.outer_update`"
    with tracing(what, f"a state and a batch of tasks {shapes_of(tasks)}"):
        closed, out, _ = eqx.filter_make_jaxpr(
            lambda s, t: strategy.outer_update(s, t, key=jax.random.key(0))
        )(state, tasks)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise TypeError(
            explain(
                f"{what} returned something else than a pair.", _show(out), "(TrainState, metrics)"
            )
        )
    new, metrics = out
    if not isinstance(metrics, dict):
        raise TypeError(
            explain(f"The metrics of {what} are invalid.", _show(metrics), "a dict of scalars")
        )
    _check_scalars(metrics, f"The metrics of {what}")
    before, after = _layout(state), _layout(new)
    if before != after:
        changed = sorted(
            path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
        )
        raise ValueError(
            explain(
                f"{what} changed the structure, a shape or a dtype of the state.",
                "; ".join(f"{path}: {before.get(path)} -> {after.get(path)}" for path in changed),
                "every leaf of the new state as in the old one",
            )
        )
    warn_slow_convolutions(closed)
    return set(metrics)


def check_init(strategy: Strategy, state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            explain(
                f"`{type(strategy).__name__}.init` returned something else than a state.",
                _show(state),
                "an `eqxmeta.TrainState`",
            )
        )


def _layout(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path((state.model, state.opt_state))
    names = {0: "model", 1: "opt_state"}
    return {
        names[path[0].idx] + jax.tree_util.keystr(path[1:]): f"{x.dtype.name}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "dtype") and hasattr(x, "shape")
    }


def _check_scalars(metrics: dict[Any, Any], what: str) -> None:
    for name, value in metrics.items():
        if not isinstance(name, str) or getattr(value, "shape", None) != ():
            raise ValueError(
                explain(
                    f"{what} are invalid.",
                    f"{name!r}: {_show(value)}",
                    "scalar arrays under string names",
                )
            )
    for name in {"step", SKIPPED} & metrics.keys():
        raise ValueError(explain(f"{what} use a reserved name.", repr(name), "another name"))


def _show(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype.name}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text[:200]}"
