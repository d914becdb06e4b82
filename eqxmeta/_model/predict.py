"""Models map one example to one output; here they are applied to many."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from .._errors import explain
from .check import check_stateless
from .holder import not_a_model
from .support_statistics import map_examples


def predict(
    model: Callable,
    x: PyTree,
    key: PRNGKeyArray | None = None,
    weight: Float[Array, " n"] | None = None,
) -> Any:
    """The model's output for each example of `x: [n, ...]`.

    A model whose `__call__` takes `key=` is given one per example, unless `key` is `None`: then,
    and for other models, it is called with the example alone. Layers that normalise with the
    statistics of a batch (`eqxmeta.nn.SupportNorm`, `eqxmeta.nn.BatchNorm`) take `x` for it, with
    the examples' weights if there are any: padding, of weight 0, has no part in them.

    Raises `TypeError` for bytes (uint8), which many a layer would take for numbers from 0 to 255,
    where `Episodes` has made pixels floats in [0, 1].
    """
    if not callable(model) and hasattr(model, "model"):  # a user's own, of no class of ours
        raise not_a_model(model, "it in the place of a model")
    _refuse_bytes(x)
    try:
        if key is None or not takes_key(model):
            return map_examples(lambda example: model(example), x, weight=weight)
        keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
        return map_examples(lambda x, key: model(x, key=key), x, keys, weight=weight)
    except Exception:
        check_stateless(model, "predict(model, ...)")  # which cannot be called without it
        raise


def _refuse_bytes(x: PyTree) -> None:
    for leaf in jax.tree.leaves(x):
        if getattr(leaf, "dtype", None) == jnp.uint8:
            expected = "floats: of pixels `x / 255`, as `Episodes` makes them; of the numbers of "
            expected += "tokens `x.astype(int)`"
            message = "`predict(model, x)` was given bytes."
            raise TypeError(explain(message, f"uint8 {list(leaf.shape)}", expected))


def predicted_class(logits: Shaped[Array, "... classes"]) -> Int[Array, "..."]:
    """The class of the largest logit, the first of equal ones; -1, which is no class, where any of
    the logits is NaN. (`argmax` takes NaN for the largest.)"""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, best)


def without_absent(
    logits: Shaped[Array, "n classes"],
    labels: Int[Array, " n"],
    weight: Shaped[Array, " n"] | None,
) -> Shaped[Array, "n classes"]:
    """With weights tasks may have fewer classes than there are logits: minus infinity for those
    above the largest of the `labels`, that of an example of weight 0 too."""
    if weight is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[1]) > jnp.max(labels), -jnp.inf, logits)


def takes_key(model: Callable) -> bool:
    try:
        parameters = inspect.signature(model).parameters
    except ValueError:  # Some built-in callables have no signature.
        return False
    kinds = {p.kind for p in parameters.values()}
    named = "key" in parameters and parameters["key"].kind is not inspect.Parameter.POSITIONAL_ONLY
    return named or inspect.Parameter.VAR_KEYWORD in kinds
