"""What the backbones share: the norm by its name, initial weights, and checks of arguments."""

import math
from typing import Literal, TypeAlias, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_choice, check_int
from .._errors import explain
from ._linear import Linear
from ._norm import BatchNorm, SupportNorm

Layer = TypeVar("Layer", bound=eqx.Module)
Norm: TypeAlias = SupportNorm | BatchNorm | eqx.nn.GroupNorm
NormName: TypeAlias = Literal["support", "batch", "layer", "group"]


def make_norm(name: NormName, channels: int) -> Norm:
    """`"support"`: `SupportNorm`. `"batch"`: `BatchNorm`, transductive. `"layer"`: each example by
    all its values; `"group"`: in groups of channels, 32 (Wu & He 2018, arXiv 1803.08494) or, where
    that does not divide `channels`, the largest power of two that does. All have a scale and a
    shift for each channel."""
    if name == "support":
        return SupportNorm(channels)
    if name == "batch":
        return BatchNorm(channels)
    return eqx.nn.GroupNorm(1 if name == "layer" else math.gcd(32, channels), channels)


def normalise(norm: Norm, x: Float[Array, "h w channels"]) -> Float[Array, "h w channels"]:
    """`norm` of an image with its channels last, as the blocks of the backbones have them."""
    if isinstance(norm, eqx.nn.GroupNorm):
        return jnp.moveaxis(norm(jnp.moveaxis(x, -1, 0)), 0, -1)
    return norm.channels_last(x)


def check_backbone(who: str, *, norm: object, ways: object) -> int | None:
    """`ways`, as `check_int` has it."""
    fault = "is not a policy of normalisation"
    check_choice(norm, f"{who}(norm=...)", get_args(NormName), fault)
    if ways is None:
        return None
    return check_int(ways, f"{who}(ways=...)", minimum=1, what="classes, or None: features only")


def check_image(who: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        message = f"`{who}` was called with an image of another shape."
        expected = f"[channels, height, width] = {list(shape)}, one example at a time"
        raise ValueError(explain(message, f"one example of shape {x.shape}", expected))


def xavier(layer: Layer, key: PRNGKeyArray) -> Layer:
    """A convolution's or linear layer's weights, uniform with variance 2 / (fan in + fan out)
    (Glorot & Bengio 2010, equation 16); biases zero."""
    weight = layer.weight  # pyright: ignore
    init = jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0)
    return set_weight(layer, init(key, weight.shape, weight.dtype))


def set_weight(layer: Layer, weight: Array) -> Layer:
    layer = eqx.tree_at(lambda x: x.weight, layer, weight)
    if layer.bias is None:  # pyright: ignore
        return layer
    return eqx.tree_at(lambda x: x.bias, layer, replace_fn=jnp.zeros_like)


def linear_head(features: int, ways: int | None, key: PRNGKeyArray) -> Linear | None:
    """Xavier-initialised; `None` for no head."""
    if ways is None:
        return None
    return xavier(Linear(features, ways, key=key), key)
