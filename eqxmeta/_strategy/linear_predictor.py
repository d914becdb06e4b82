"""What predicts by a linear map of features, for strategies that compute that map for each task."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._model.features import embedded


class LinearPredictor(eqx.Module):
    """Maps one example to `[outputs]`, logits of classes or numbers: `w_k·f(x) + b_k`.

    - `embedding`: f, of the user's own type.
    - `weight`: w, `[outputs, features]`. `bias`: b, `[outputs]`.
    - `present`: `[outputs]`, whether the class was in the support set; the logit of one that was
      not is minus infinity.
    """

    embedding: PyTree
    weight: Float[Array, "outputs features"]
    bias: Float[Array, " outputs"]
    present: Bool[Array, " outputs"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " outputs"]:
        outputs = self.weight @ embedded(self.embedding, x, key) + self.bias
        return jnp.where(self.present, outputs, -jnp.inf)
