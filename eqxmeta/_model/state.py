"""The state of a run: what is meta-learnt, and the state of the outer optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

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


def without_weak_types(tree: PyTree) -> PyTree:
    """Arrays of `tree` as JAX arrays without weak types, so that a loop may carry them."""
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype) if eqx.is_array(x) else x, tree)


def to_be_trained(model: PyTree) -> PyTree:
    """`model` as a state holds it: its arrays as JAX arrays, without what it knows of a task."""
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    return without_weak_types(without_statistics(model))
