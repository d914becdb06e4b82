"""A model that has adapted, ready to predict."""

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree

from .._model.support_statistics import fill_statistics
from .strategy import Strategy


def adapted_model(
    strategy: Strategy, model: PyTree, support: PyTree, key: PRNGKeyArray | None
) -> PyTree:
    """`model` adapted to `support`, with dropout, of which `key` is the key; what comes back
    predicts without, by the statistics of the support set."""
    adapted = strategy.inner_adapt(model, support, key=key)
    # Strategies that need not have a loss for it: only asked for if there are such layers.
    adapted = fill_statistics(adapted, lambda m: strategy.loss(m, support, key))  # pyright: ignore
    return eqx.nn.inference_mode(adapted)
