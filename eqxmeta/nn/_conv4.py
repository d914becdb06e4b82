"""The four-block convolutional network of few-shot classification."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_int
from ._blocks import (
    NormName,
    check_backbone,
    check_image,
    linear_head,
    make_norm,
    normalise,
    xavier,
)
from ._conv import Conv2d
from ._linear import Linear
from ._pool import MaxPool2d


class Conv4(eqx.Module):
    """The field's backbone: four blocks of a 3x3 convolution, norm, relu and 2x2 max-pooling, then
    a linear layer: Vinyals et al. 2016 (arXiv 1606.04080), section 4.1.

        model = Conv4(1, ways=5, key=key)              # Omniglot: 64 features of a 28x28 image
        model = Conv4(3, ways=5, size=84, key=key)     # miniImageNet: 1600 of an 84x84 image

    - `channels` of the images, `size` of their sides in pixels, 16 or more.
    - `ways`: classes. `None`: no head, and the model's output are the features (ProtoNet).
    - `width`: filters of each convolution. MAML used 32 on miniImageNet.
    - `norm`: `"support"` (the default, see `SupportNorm`), `"batch"` (transductive, see
      `BatchNorm`), `"layer"` or `"group"`.

    One image in, `x: [channels, size, size]`; logits out, `[ways]`. `features(x)` is what the
    linear layer `head` sees, `[width, rows, columns]` flattened. Initialised as in the code of MAML
    (Finn et al. 2017, github.com/cbfinn/maml): Xavier-uniform weights, zero biases. (For Omniglot
    that code draws the head from a unit normal distribution; here it is Xavier-uniform too.)

    Raises `TypeError` or `ValueError` for an argument that is not as above.
    """

    blocks: tuple["_Block", ...]
    head: Linear | None
    channels: int = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        ways: int | None,
        *,
        size: int = 28,
        width: int = 64,
        norm: NormName = "support",
        key: PRNGKeyArray,
    ):
        ways = check_backbone("Conv4", norm=norm, ways=ways)
        channels = check_int(channels, "Conv4(channels=...)", minimum=1, what="channels")
        size = check_int(size, "Conv4(size=...)", minimum=16, what="pixels a side")
        width = check_int(width, "Conv4(width=...)", minimum=1, what="filters")
        *keys, head_key = jax.random.split(key, 5)
        inputs = (channels, width, width, width)
        self.blocks = tuple(_Block(i, width, norm, k) for i, k in zip(inputs, keys, strict=True))
        self.head = linear_head(width * (size // 16) ** 2, ways, head_key)
        self.channels = channels
        self.size = size

    def features(self, x: Float[Array, "channels size size"]) -> Float[Array, " features"]:
        check_image("Conv4", x, (self.channels, self.size, self.size))
        x = jnp.moveaxis(x, 0, -1)
        for block in self.blocks:
            x = block(x)
        return jnp.moveaxis(x, -1, 0).reshape(-1)

    def __call__(
        self, x: Float[Array, "channels size size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " outputs"]:
        features = self.features(x)
        return features if self.head is None else self.head(features)


class _Block(eqx.Module):
    conv: Conv2d
    norm: Any
    pool: MaxPool2d

    def __init__(self, channels: int, width: int, norm: NormName, key: PRNGKeyArray):
        self.conv = xavier(Conv2d(channels, width, 3, padding=1, key=key), key)
        self.norm = make_norm(norm, width)
        self.pool = MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "rows columns out"]:
        x = normalise(self.norm, self.conv.channels_last(x))
        # Relu is monotone: after pooling it gives the same, on a quarter of the values.
        return jax.nn.relu(self.pool.channels_last(x))
