"""The state of a run: what is meta-learnt, and the state of the outer optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def without_values(tree: PyTree) -> PyTree:
    """`tree` with shapes and dtypes in the place of its large arrays. The others cost nothing, and
    among them is what may be asked of a state: its step, the rate of an optimizer."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) and x.size > 10_000 else x
        ),
        tree,
    )


def init_state(model: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first outer step: `optimizer` looks after the inexact arrays of `model`."""
    model = without_weak_types(
        jax.tree.map(
            lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, without_statistics(model)
        )
    )
    opt_state = without_weak_types(optimizer.init(eqx.filter(model, eqx.is_inexact_array)))
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)
