"""The state of a run: what is meta-learnt, and the state of the outer optimizer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from .._errors import explain
from .support_statistics import without_statistics


class TrainState(eqx.Module):
    """Everything that a run learns.

    - `step`: outer steps taken so far, int32 scalar. The trainer owns it.
    - `model`: what is meta-learnt. The user's own model, or an `eqx.Module` with a field
      `.model` for strategies that learn more than an initialisation.
    - `opt_state`: state of the outer optimizer.
    """

    step: Int[Array, ""]
    model: PyTree
    opt_state: PyTree


@eqx.filter_jit
def copied(state: TrainState) -> TrainState:
    """The same values in buffers of their own."""
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)


class MetaParameters(eqx.Module):
    """What `TrainState.model` holds where more than the user's model is meta-learnt.

    - `model`: the user's own, from which tasks start.
    - `extra`: the rest, any pytree: every inexact array in it is learnt.
    """

    model: PyTree
    extra: PyTree


def own_model(model: PyTree) -> PyTree:
    """The user's own part of what `TrainState.model` holds."""
    return model.model if isinstance(model, MetaParameters) else model


def meta_parameters(model: Any, strategy: str) -> MetaParameters:
    """`model`. Raises `TypeError` if it is not what a `strategy` that learns more than it has."""
    if not isinstance(model, MetaParameters):
        message = f"`model` is not all that `{strategy}` learns."
        expected = f"what `TrainState.model` holds: `{strategy}(...).init(model).model`, or a "
        raise TypeError(explain(message, type(model).__name__, expected + "trained one"))
    return model


def without_weak_types(tree: PyTree) -> PyTree:
    """Arrays of `tree` as JAX arrays without weak types, so that a loop may carry them."""
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype) if eqx.is_array(x) else x, tree)


def to_be_trained(model: PyTree) -> PyTree:
    """`model` as a state holds it: its arrays as JAX arrays, without what it knows of a task."""
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    return without_weak_types(without_statistics(model))


def update_of(
    optimizer: optax.GradientTransformation, name: str
) -> Callable[[PyTree, PyTree, PyTree, Array], tuple[PyTree, PyTree]]:
    """`update(grads, state, params, value)` of `optimizer`, given also the value that is descended
    if it wants that, as `optax.contrib.reduce_on_plateau` does. Raises `TypeError`, naming it,
    for one that wants more."""

    def with_value(grads: PyTree, state: PyTree, params: PyTree, value: Array):
        try:
            return optimizer.update(grads, state, params, value=value)  # pyright: ignore
        except TypeError as error:
            # Not by its class: `MultiSteps` takes what it hands on, and `sam` does not.
            if "unexpected keyword argument 'value'" in str(error):
                return optimizer.update(grads, state, params)
            if "required keyword-only argument" not in str(error):
                raise
            message = f"{name} wants more than a step has."
            expected = (
                "an optimizer that needs gradients, parameters and `value`, the loss, at most; "
                "no line search, such as `optax.lbfgs` makes"
            )
            raise TypeError(explain(message, error, expected)) from error

    return with_value
