"""A two-dimensional convolution."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PRNGKeyArray

from .._errors import explain
from ._bilinear import Geometry, convolve
from ._equinox import check_sizes, take_fields

_PAD_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


class Conv2d(eqx.Module):
    """`equinox.nn.Conv2d` with the same parameters and results, fast where that one is not: on a
    CPU inside of loops, under `vmap` over the weights, and in first and second derivatives.

    Takes the arguments of `equinox.nn.Conv2d`, and raises what it raises; also `ValueError` for
    sizes below 1 and for `out_channels` that `groups` does not divide. For the same `key` the
    parameters are the same bits: `weight [out, in / groups, kh, kw]`, `bias [out, 1, 1]` or
    `None`. `eqxmeta.nn.fast` converts a whole model.
    """

    weight: Array
    bias: Array | None
    num_spatial_dims: int = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    kernel_size: tuple[int, int] = eqx.field(static=True)
    stride: tuple[int, int] = eqx.field(static=True)
    padding: str | tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True)
    dilation: tuple[int, int] = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    padding_mode: str = eqx.field(static=True)

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        use_bias=True,
        padding_mode="ZEROS",
        dtype=None,
        *,
        key: PRNGKeyArray,
    ):
        check_sizes("Conv2d", kernel_size=kernel_size, stride=stride, dilation=dilation)
        conv = eqx.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            use_bias,
            padding_mode,
            dtype,
            key=key,
        )
        if out_channels % groups:
            received = f"{out_channels} of {groups} groups"
            expected = "channels that `groups` divides, as it does `in_channels`"
            message = "`Conv2d(out_channels=...)` is invalid."
            raise ValueError(explain(message, received, expected))
        take_fields(self, conv)

    def __call__(
        self, x: Inexact[Array, "in h w"], *, key: PRNGKeyArray | None = None
    ) -> Inexact[Array, "out rows columns"]:
        """One image, channels first. `key` is ignored."""
        del key
        x = jnp.asarray(x)  # of NumPy's float64 JAX makes its own float
        if x.ndim != 3 or x.shape[0] != self.in_channels:
            expected = f"one image [{self.in_channels}, height, width], without a batch axis"
            raise ValueError(explain("The input of `Conv2d` is invalid.", x.shape, expected))
        if x.dtype != self.weight.dtype:
            expected = f"{self.weight.dtype}"
            raise TypeError(explain("The input of `Conv2d` is invalid.", x.dtype, expected))
        return jnp.moveaxis(self.channels_last(jnp.moveaxis(x, 0, -1)), -1, 0)

    def channels_last(self, x: Inexact[Array, "h w in"]) -> Inexact[Array, "rows columns out"]:
        """The same of an image whose channels are its last axis, as they are in the computation:
        what stands between two layers then costs no transposed copies."""
        kernel, size = self.kernel_size, (x.shape[0], x.shape[1])
        padding = self.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) + 1 for k, d in zip(kernel, self.dilation, strict=True)]
            padding = lax.padtype_to_pads(size, reach, self.stride, padding)
        (top, bottom), (left, right) = padding
        padding = (int(top), int(bottom)), (int(left), int(right))
        if self.padding_mode != "ZEROS":
            x = jnp.pad(x, (*padding, (0, 0)), _PAD_MODES[self.padding_mode])
            size, padding = (x.shape[0], x.shape[1]), ((0, 0), (0, 0))
        geometry = Geometry(size, kernel, self.stride, padding, self.dilation)
        if 0 in geometry.out:
            return jnp.zeros((*geometry.out, self.out_channels), x.dtype)

        # A group as a task: groups have weights of their own.
        w = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        w = jnp.transpose(w, (0, 3, 4, 2, 1))
        images = jnp.moveaxis(x.reshape(*size, self.groups, self.in_channels // self.groups), 2, 0)
        y = jnp.moveaxis(convolve(images[:, None], w, geometry)[:, 0], 0, 2)
        y = y.reshape(*geometry.out, self.out_channels)
        return y if self.bias is None else y + jnp.moveaxis(self.bias, 0, -1)
