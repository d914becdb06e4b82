"""What is wrong with a loss by itself, asked where tracing an outer step has failed."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._errors import add_note, advice, annotate_errors, takes
from .._model.predict import predict
from .._strategy.metrics import LOSS, check_loss_output
from .._strategy.strategy import Strategy
from .._task.task import Task, shapes_of


def check_loss(strategy: Strategy, model: PyTree, task: Task) -> None:
    """Raises what `strategy.loss` does wrong on the shapes of a task's queries:
    it must be traceable, and return a scalar and a dict. (The support set is the strategy's own
    affair: it may need no labels.)

    `model` is what `TrainState.model` holds."""

    def predictor_of(model: PyTree, task: Task) -> Any:
        before = strategy.unadapted(model)
        if before is not None:
            return before
        return strategy.inner_adapt(model, task.support, key=jax.random.key(0))

    def of_query(model: PyTree, task: Task) -> Any:
        return strategy.loss(predictor_of(model, task), task.query, jax.random.key(0))

    def has_other_arguments(error: Exception) -> bool:
        return not takes(strategy.loss, "model", "batch", "key")

    received = f"{type(model).__name__}, and a batch of {shapes_of(task.query)}"
    expected = f"{LOSS} -> (scalar, dict of scalar metrics)"
    with annotate_errors(LOSS, received, expected, seen=has_other_arguments):
        try:
            out = eqx.filter_eval_shape(of_query, model, task)
        except Exception as error:
            if not has_other_arguments(error):
                _note_refusal(error, predictor_of, model, task)
            raise
    check_loss_output(out)


def _note_refusal(error: Exception, predictor_of: Any, model: PyTree, task: Task) -> None:
    """Where the loss failed: say so if it did because the model does not take an example."""
    query = task.query
    if not (isinstance(query, tuple | list) and len(query) in (2, 3)):
        return

    def of_one(model: PyTree, task: Task) -> None:
        predict(predictor_of(model, task), task.query[0], jax.random.key(0))

    try:
        eqx.filter_eval_shape(of_one, model, task)
    except Exception as refusal:  # `error` is what is raised, and this only says where from
        if type(refusal) is not type(error) or not all(x.shape for x in jax.tree.leaves(query[0])):
            return  # or it has no example axis
        example = shapes_of(without_first_axis(query[0]))
        add_note(
            error,
            f"The model refused one example. (The error came out of {LOSS}.)",
            f"{type(model).__name__}, and an example of shape {example}, of a batch of "
            f"{shapes_of(query)}",
            advice(error, "a model that takes one such example, without a batch axis"),
        )


def without_first_axis(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
