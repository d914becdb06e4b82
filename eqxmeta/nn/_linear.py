"""A linear layer."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray


class Linear(eqx.nn.Linear):
    """`equinox.nn.Linear` with the same parameters and results, computed as `x @ weight.T`.

    Of `weight @ x` a `vmap` over examples makes `weight @ x.T`: the examples become the last axis,
    and every layer, and its derivative, copies them to the front again. The vector first, they are
    first everywhere. What that brings in a run: `python -m benchmarks --only loop`.

    Takes the arguments of `equinox.nn.Linear` and raises what it raises. `eqxmeta.nn.fast` converts
    a whole model.
    """

    # Without it a type checker would take the fields for the arguments.
    def __init__(
        self,
        in_features: int | Literal["scalar"],
        out_features: int | Literal["scalar"],
        use_bias: bool = True,
        dtype=None,
        *,
        key: PRNGKeyArray,
    ):
        super().__init__(in_features, out_features, use_bias, dtype, key=key)

    def __call__(
        self, x: Inexact[Array, "*in_features"], *, key: PRNGKeyArray | None = None
    ) -> Inexact[Array, "*out_features"]:
        """One example, `[in_features]`, or `[]` if that is `"scalar"`. `key` is ignored."""
        if jnp.ndim(x) != (self.in_features != "scalar"):
            return super().__call__(x, key=key)  # says what is wrong, or multiplies a matrix
        y = jnp.tensordot(jnp.atleast_1d(x), self.weight, (0, 1))
        y = y if self.bias is None else y + self.bias
        return jnp.squeeze(y) if self.out_features == "scalar" else y
