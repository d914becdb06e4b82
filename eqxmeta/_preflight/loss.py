"""What is wrong with a loss by itself, asked where tracing an outer step has failed."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._errors import add_note, advice, annotate_errors, takes
from .._model.predict import predict
from .._strategy.metrics import LOSS, check_loss_output
from .._strategy.strategy import Strategy
from .._task.task import shapes_of


def check_loss(strategy: Strategy, model: PyTree, support: PyTree) -> None:
    """Raises what `strategy.loss`, if there is one, does wrong on the shapes `support` of a task:
    it must be traceable, and return a scalar and a dict.

    `model` is what `TrainState.model` holds."""
    loss = getattr(strategy, "loss", None)
    if loss is None:
        return

    def predictor_of(model: PyTree, support: PyTree) -> Any:
        before = strategy.unadapted(model)
        if before is not None:
            return before
        return strategy.inner_adapt(model, support, key=jax.random.key(0))

    def of_support(model: PyTree, support: PyTree) -> Any:
        return loss(predictor_of(model, support), support, jax.random.key(0))

    def has_other_arguments(error: Exception) -> bool:
        return not takes(loss, "model", "batch", "key")

    received = f"{type(model).__name__}, and a batch of {shapes_of(support)}"
    expected = f"{LOSS} -> (scalar, dict of scalar metrics)"
    with annotate_errors(LOSS, received, expected, seen=has_other_arguments):
        try:
            out = eqx.filter_eval_shape(of_support, model, support)
        except Exception as error:
            if not has_other_arguments(error):
                _note_refusal(error, predictor_of, model, support)
            raise
    check_loss_output(out)


def _note_refusal(error: Exception, predictor_of: Any, model: PyTree, support: PyTree) -> None:
    """Where the loss failed: say so if it did because the model does not take an example."""
    if not (isinstance(support, tuple | list) and len(support) == 2):
        return

    def of_one(model: PyTree, support: PyTree) -> None:
        predict(predictor_of(model, support), support[0], jax.random.key(0))

    try:
        eqx.filter_eval_shape(of_one, model, support)
    except Exception as refusal:  # `error` is what is raised, and this only says where from
        if type(refusal) is not type(error):
            return
        example = shapes_of(without_first_axis(support[0]))
        add_note(
            error,
            f"The model refused one example. (The error came out of {LOSS}.)",
            f"{type(model).__name__}, and an example of shape {example}, of a batch of "
            f"{shapes_of(support)}",
            advice(error, "a model that takes one such example, without a batch axis"),
        )


def without_first_axis(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
