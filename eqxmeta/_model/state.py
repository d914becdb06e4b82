"""The state of a run: what is meta-learnt, and the state of the outer optimizer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._errors import explain
from .holder import HoldsModel
from .support_statistics import without_statistics


class TrainState(HoldsModel):
    """Everything that a run learns.

    - `step`: outer steps taken so far, int32 scalar. The trainer owns it.
    - `model`: what is meta-learnt. The user's own model, or a `MetaParameters` of it for
      strategies that learn more than an initialisation.
    - `opt_state`: state of the outer optimizer.

    What changes from step to step is an array. Other leaves, such as a number of Python or a
    string, may be there as long as no step changes them: `fit` refuses that, naming the leaf.
    """

    step: Int[Array, ""]
    model: PyTree
    opt_state: PyTree


@eqx.filter_jit
def copied(state: TrainState) -> TrainState:
    """The same values in buffers of their own."""
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)


class MetaParameters(HoldsModel):
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


def without_values(tree: PyTree) -> PyTree:
    """`tree` with shapes and dtypes in the place of its large arrays. Small ones cost nothing; they
    and what `optax.inject_hyperparams` keeps are looked at: the step, the rate of an optimizer."""

    def shape_of(path: Any, x: Any) -> Any:
        asked = ".hyperparams[" in jax.tree_util.keystr(path)
        large = eqx.is_array(x) and x.size > 10_000 and not asked
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if large else x

    return jax.tree_util.tree_map_with_path(shape_of, tree)


def to_be_trained(model: PyTree) -> PyTree:
    """`model` as a state holds it: its arrays as JAX arrays, without what it knows of a task."""
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    return without_weak_types(without_statistics(model))
