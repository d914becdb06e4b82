"""Minibatches of one task's examples, for the steps of an inner loop."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from .examples import has_weights
from .task import count_examples


def minibatches(
    data: PyTree, size: int | None, steps: int, key: PRNGKeyArray | None
) -> tuple[PyTree, Int[Array, "steps rows"] | None]:
    """`(data, rows)`: the rows of `data`, `size` examples, that each of `steps` steps sees. They
    are drawn without replacement, and shuffled anew when all have been seen. `None`: all rows at
    every step, for a `size` of `None` or of more than there are.

    Rows of weight 0 are not drawn."""
    examples = count_examples(data) or 0
    if size is None or size >= examples or steps == 0:
        return data, None
    # Without a key, for `inner_adapt` on its own, the order is arbitrary but fixed.
    key = jax.random.key(0) if key is None else key
    if has_weights(data):
        return _with_number_of_classes(data, _rows_that_exist(data[2] > 0, steps, size, key))
    epochs = -(-steps * size // examples)
    # An epoch is the same whatever comes after it.
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
    return data, order.reshape(-1)[: steps * size].reshape(steps, size)


def _rows_that_exist(
    exists: Bool[Array, " n"], steps: int, size: int, key: PRNGKeyArray
) -> Int[Array, "steps size"]:
    """Rows of the examples that exist; where these are fewer than `size`, all of them in each
    minibatch, and padding."""
    count = jnp.maximum(jnp.sum(exists), 1)
    column = jnp.arange(size)[None, :]
    place = jnp.arange(steps)[:, None] * jnp.minimum(size, count) + column
    epoch, rank = jnp.divmod(place, count)
    rank = jnp.where(column < count, rank, column)

    def shuffled(epoch: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(key, epoch), exists.shape[0])
        return order[jnp.argsort(~exists[order], stable=True)]

    order = jax.vmap(shuffled)(jnp.arange(steps + 1))
    return order[jnp.minimum(epoch, steps), rank]


def _with_number_of_classes(
    data: PyTree, rows: Int[Array, "steps size"]
) -> tuple[PyTree, Int[Array, "steps size+1"]]:
    """Minibatches that say how many classes the task has, though they may lack the last: each has
    an example of that one too, of weight 0. (Of targets that are no labels there is no need.)"""
    x, y, weight = data
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        return data, rows
    last = jnp.argmax(y)
    x, y = jax.tree.map(lambda x: jnp.concatenate([x, x[last][None]]), (x, y))
    weight = jnp.concatenate([weight, jnp.zeros(1, weight.dtype)])
    return (x, y, weight), jnp.pad(rows, ((0, 0), (0, 1)), constant_values=y.shape[0] - 1)
