"""What predicts by a head on features, for strategies that make a head for each task."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._model.features import embedded


class LinearHead(eqx.Module):
    """`w_k·f + b_k`, of features f."""

    weight: Float[Array, "outputs features"]
    bias: Float[Array, " outputs"]

    def __call__(self, features: Float[Array, " features"]) -> Float[Array, " outputs"]:
        return self.weight @ features + self.bias


class HeadPredictor(eqx.Module):
    """Maps one example to `[outputs]`, logits of classes or numbers: `head(f(x))`.

    - `embedding`: f, the user's own model. `head`: from its features to outputs.
    - `present`: `[outputs]`, whether the class was in the support set; the logit of one that was
      not is minus infinity. `None`: all were, or there are no classes.
    """

    embedding: PyTree
    head: Callable
    present: Bool[Array, " outputs"] | None

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " outputs"]:
        out = self.head(embedded(self.embedding, x, key))
        return out if self.present is None else jnp.where(self.present, out, -jnp.inf)
