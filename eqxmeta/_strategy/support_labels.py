"""Labels of the support set, compared with the model's outputs where their values are known."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._types import Loss


def check_support_labels(
    loss: Loss, model: PyTree | None, support: PyTree, key: PRNGKeyArray | None
) -> None:
    """Shows `loss` the labels of `support`, if they have values: inside of the compiled program,
    where labels are traced, `cross_entropy` could not say that one is no class.

    Only shapes are traced, and once for all labels of one range."""
    if model is None or not isinstance(support, tuple | list) or len(support) != 2:
        return
    x, y = support
    # A key that is traced says that the caller is, with labels that are closed over.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((model, x, y, key))):
        return
    if not isinstance(y, jax.Array | np.ndarray) or y.ndim != 1 or y.size == 0:
        return
    if not jnp.issubdtype(y.dtype, jnp.integer):
        return
    labels = np.asarray(y)
    known = (len(labels), labels.dtype, int(labels.min()), int(labels.max()))
    leaves, structure = jax.tree.flatten((loss, model, x))
    specs = tuple(map(_spec, leaves))
    try:
        hash((structure, specs))
    except TypeError:  # the compiled program will say so
        return
    _show_labels(structure, specs, known, key is not None)


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return leaf


@functools.lru_cache(maxsize=256)
def _show_labels(structure: Any, specs: tuple, known: tuple, keyed: bool) -> None:
    length, dtype, low, high = known
    labels = np.full(length, high, dtype)
    labels[0] = low
    with jax.ensure_compile_time_eval():  # whoever calls may be traced, and this be remembered
        y = jnp.asarray(labels)

    def of_batch(of: PyTree) -> None:
        loss, model, x = of
        loss(model, (x, y), jax.random.key(0) if keyed else None)

    eqx.filter_eval_shape(of_batch, jax.tree.unflatten(structure, specs))
