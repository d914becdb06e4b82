"""Features of the support set, for heads that are computed from them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .predict import predict, takes_key
from .support_statistics import fill_statistics, without_statistics


def features(
    model: PyTree,
    x: PyTree,
    *,
    key: PRNGKeyArray | None = None,
    weight: Float[Array, " n"] | None = None,
) -> tuple[Float[Array, "n d"], PyTree]:
    """`(features, model)`: the model's output for each of the n support examples `x: [n, ...]`, as
    a vector, and the model as it embeds queries: layers that normalise by the support set
    (`eqxmeta.nn.SupportNorm`) keep the statistics of this pass, with the `weight` of the examples
    if they have any. `key` is for dropout."""
    found = []

    def embed(model: PyTree) -> None:
        out = predict(model, x, key, weight)
        found.append(out.reshape(jax.tree.leaves(x)[0].shape[0], -1))

    model = fill_statistics(without_statistics(model), embed)
    if not found:  # there are no such layers
        embed(model)
    (out,) = found
    return out, model


def called(model: Any, x: PyTree, key: PRNGKeyArray | None) -> Array:
    """The model's output for one example, with `key` if it takes one."""
    return model(x, key=key) if key is not None and takes_key(model) else model(x)


def embedded(model: Any, x: PyTree, key: PRNGKeyArray | None) -> Float[Array, " d"]:
    """The model's output for one example, as a vector."""
    return jnp.ravel(called(model, x, key))
