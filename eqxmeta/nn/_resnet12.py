"""ResNet-12."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_int
from .._errors import explain
from ._blocks import NormName, check_backbone, linear_head, make_norm, normalise, set_weight
from ._conv import Conv2d
from ._linear import Linear
from ._pool import MaxPool2d

_WIDTHS = (64, 160, 320, 640)


class ResNet12(eqx.Module):
    """Twelve convolutions in four residual blocks of 64, 160, 320 and 640 filters, 12.4 million
    parameters: Oreshkin et al. 2018 (TADAM, arXiv 1805.10123), in the widths of Lee et al. 2019
    (MetaOptNet, arXiv 1904.03758), section 4.1.

    A block is three 3x3 convolutions, each with norm, leaky relu of slope 0.1, a 1x1 convolution
    with norm around them, and 2x2 max-pooling; then the mean over positions, and a linear layer.
    Without the DropBlock of the paper, which regularises training.

    - `channels`, `ways`, `norm`: as for `Conv4`.

    One image in, `x: [channels, height, width]`, sides of 16 pixels or more; logits out, `[ways]`.
    `features(x): [640]` is what the linear layer `head` sees. Initialised as in the code of
    MetaOptNet (github.com/kjunelee/MetaOptNet): convolutions, which have no bias, by a normal
    distribution of variance 2 / fan out (He et al. 2015, arXiv 1502.01852). The head, of which
    that paper has none, is Xavier-uniform.

    Raises `TypeError` or `ValueError` for an argument that is not as above.
    """

    blocks: tuple["_Block", ...]
    head: Linear | None

    def __init__(
        self,
        channels: int,
        ways: int | None,
        *,
        norm: NormName = "support",
        key: PRNGKeyArray,
    ):
        ways = check_backbone("ResNet12", norm=norm, ways=ways)
        channels = check_int(channels, "ResNet12(channels=...)", minimum=1, what="channels")
        *keys, head_key = jax.random.split(key, 5)
        inputs = (channels, *_WIDTHS[:-1])
        self.blocks = tuple(
            _Block(i, o, norm, k) for i, o, k in zip(inputs, _WIDTHS, keys, strict=True)
        )
        self.head = linear_head(_WIDTHS[-1], ways, head_key)

    def features(self, x: Float[Array, "channels height width"]) -> Float[Array, "640"]:
        if x.ndim == 3 and min(x.shape[1:]) < 16:
            expected = "[channels, height, width], sides of 16 pixels or more: four times halved"
            message = "`ResNet12` was called with an image that is too small."
            raise ValueError(explain(message, f"one example of shape {x.shape}", expected))
        x = jnp.moveaxis(x, 0, -1)
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=(0, 1))

    def __call__(
        self, x: Float[Array, "channels height width"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " outputs"]:
        features = self.features(x)
        return features if self.head is None else self.head(features)


class _Block(eqx.Module):
    convs: tuple[Conv2d, ...]
    norms: tuple[Any, ...]
    shortcut: Conv2d
    shortcut_norm: Any
    pool: MaxPool2d

    def __init__(self, channels: int, width: int, norm: NormName, key: PRNGKeyArray):
        *keys, shortcut_key = jax.random.split(key, 4)
        inputs = (channels, width, width)
        self.convs = tuple(_conv(i, width, 3, k) for i, k in zip(inputs, keys, strict=True))
        self.norms = tuple(make_norm(norm, width) for _ in self.convs)
        self.shortcut = _conv(channels, width, 1, shortcut_key)
        self.shortcut_norm = make_norm(norm, width)
        self.pool = MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "rows columns out"]:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = normalise(norm, conv.channels_last(_leaky_relu(y) if i else y))
        y = y + normalise(self.shortcut_norm, self.shortcut.channels_last(x))
        # Monotone: after pooling it gives the same, on a quarter of the values.
        return _leaky_relu(self.pool.channels_last(y))


def _leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.1)


def _conv(channels: int, width: int, size: int, key: PRNGKeyArray) -> Conv2d:
    layer = Conv2d(channels, width, size, padding=(size - 1) // 2, use_bias=False, key=key)
    std = math.sqrt(2 / (width * size**2))
    weight = std * jax.random.normal(key, layer.weight.shape, layer.weight.dtype)
    return set_weight(layer, weight)
