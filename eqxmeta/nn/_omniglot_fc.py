"""The fully connected Omniglot network of the MAML paper."""

import math
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_int
from .._errors import explain
from ._blocks import NormName, check_backbone, make_norm, set_weight
from ._linear import Linear

_WIDTHS = (256, 128, 64, 64)


class OmniglotFC(eqx.Module):
    """The fully connected network for Omniglot: layers of 256, 128, 64 and 64 units, each with
    norm and relu, then a linear layer: Santoro et al. 2016 (arXiv 1605.06065), as in Finn et al.
    2017 (arXiv 1703.03400), section 5.2.

    - `inputs`: values of an example; 784 for 28x28.
    - `ways`, `norm`: as for `Conv4`; but 0.001 is added to the variance, and there is a shift and
      no scale, as in the code of MAML, by the defaults of TensorFlow's `batch_norm`. (Small weights
      make small variances: with the usual 1e-5 the first gradient is about two to three times as
      large.)

    One example in, of any shape with `inputs` values; logits out, `[ways]`. `features(x): [64]` is
    what the linear layer `head` sees. Initialised as in that code (github.com/cbfinn/maml): weights
    of a truncated normal distribution, standard deviation 0.01, zero biases. There the shifts do
    not adapt: `InnerLoop(..., adapt=lambda m: (m.layers, m.head))`.

    Raises `TypeError` or `ValueError` for an argument that is not as above.
    """

    layers: tuple[Linear, ...]
    norms: tuple[Any, ...]
    head: Linear | None

    def __init__(
        self,
        inputs: int,
        ways: int | None,
        *,
        norm: NormName = "support",
        key: PRNGKeyArray,
    ):
        ways = check_backbone("OmniglotFC", norm=norm, ways=ways)
        inputs = check_int(inputs, "OmniglotFC(inputs=...)", minimum=1, what="values")
        *keys, head_key = jax.random.split(key, 5)
        sizes = (inputs, *_WIDTHS)
        self.layers = tuple(
            _linear(i, o, k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )
        self.norms = tuple(make_norm(norm, width, eps=1e-3, scale=False) for width in _WIDTHS)
        self.head = None if ways is None else _linear(_WIDTHS[-1], ways, head_key)

    def features(self, x: Float[Array, "..."]) -> Float[Array, "64"]:
        inputs = self.layers[0].in_features
        if math.prod(x.shape) != inputs:
            received = f"one example of shape {x.shape}, {math.prod(x.shape)} values"
            expected = f"{inputs} values, as `OmniglotFC(inputs=...)` says, one example at a time"
            message = "`OmniglotFC` was called with an example of another size."
            raise ValueError(explain(message, received, expected))
        x = x.reshape(inputs)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        return x

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " outputs"]:
        features = self.features(x)
        return features if self.head is None else self.head(features)


def _linear(inputs: int, outputs: int, key: PRNGKeyArray) -> Linear:
    layer = Linear(inputs, outputs, key=key)
    # TensorFlow's cuts at two standard deviations of what is cut, and does not widen the rest.
    normal = jax.random.truncated_normal(key, -2.0, 2.0, layer.weight.shape, layer.weight.dtype)
    return set_weight(layer, 0.01 * normal)
