"""What a batch is made of: examples, targets, and weights where there are any."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._errors import explain
from .task import Task, shapes_of


def examples(batch: PyTree) -> tuple[PyTree, Array, Float[Array, " n"] | None]:
    """`(x, y, weight)` of a batch, which is `(x, y)` or `(x, y, weight)`; without weights, where
    every example counts alike, `weight` is `None`.

    - `weight`: `[n]`, floating, 0 or more. A mean over examples is `sum(w l) / sum(w)`. An example
      of weight 0 is padding, and does not exist: it may be anything. Its `x` is returned as that of
      an example which does exist, so that no model makes NaN or infinity of it, whose product with
      0 would be NaN.

    For a loss or a strategy of your own. Raises `TypeError` or `ValueError` for a batch that is
    not as above.
    """
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        whole = isinstance(batch, Task)
        received = "a whole `Task`" if whole else str(jax.tree.structure(batch))
        expected = "`(x, y)` or `(x, y, weight)`" + ", such as `task.support`" * whole
        raise TypeError(explain("A batch is not a pair.", received, expected))
    x, y, *rest = batch
    y = as_array(y, "Targets")
    if not rest:
        return x, y, None
    weight = as_array(rest[0], "Weights")
    if weight.shape != y.shape[:1] or not jnp.issubdtype(weight.dtype, jnp.floating):
        received = f"weights {shapes_of(weight)} beside targets {shapes_of(y)}"
        expected = "`(x, y, weight)`, weights [n], floating: one, 0 or more, for each example"
        raise ValueError(explain("The weights of a batch are invalid.", received, expected))
    real = jnp.argmax(weight > 0)

    def without_padding(x: Any) -> Array:
        x = jnp.asarray(x)
        exists = (weight > 0).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(exists, x, jnp.expand_dims(x[real], 0))

    return jax.tree.map(without_padding, x), y, weight


def has_weights(batch: PyTree) -> bool:
    """Whether a batch, which may be anything, is `(x, y, weight)`."""
    if not isinstance(batch, tuple | list) or len(batch) != 3:
        return False
    _, y, weight = batch
    arrays = all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (y, weight))
    return arrays and weight.shape == y.shape[:1] and jnp.issubdtype(weight.dtype, jnp.floating)


def weighted_mean(values: Float[Array, "n ..."], weight: Float[Array, " n"] | None) -> Array:
    """The mean of all `values`; with weights that of the examples' means. Those of padding are left
    out, NaN or not; their gradient is zero."""
    if weight is None:
        return jnp.mean(values)
    means = jnp.mean(values, axis=tuple(range(1, values.ndim)))
    weight = weight.astype(means.dtype)
    return jnp.sum(jnp.where(weight > 0, weight * means, 0)) / jnp.sum(weight)


def as_array(x: Any, what: str) -> Array:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        received = str(jax.tree.structure(x))
        raise TypeError(explain(f"{what} are not an array.", received, "one array"))
    return jnp.asarray(x)
