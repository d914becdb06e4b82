"""Two-dimensional pooling."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact, PRNGKeyArray

from .._errors import explain
from ._equinox import check_sizes, take_fields


class MaxPool2d(eqx.Module):
    """`equinox.nn.MaxPool2d` with the same results, whose derivatives are cheap on a CPU.

    Takes the arguments of `equinox.nn.MaxPool2d`, and raises what it raises, and
    `ValueError` for sizes below 1. Of equal maxima in a
    window the first one, row by row, gets the whole gradient, as with Equinox's.
    """

    num_spatial_dims: int = eqx.field(static=True)
    kernel_size: tuple[int, int] = eqx.field(static=True)
    stride: tuple[int, int] = eqx.field(static=True)
    padding: tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True)
    use_ceil: bool = eqx.field(static=True)

    def __init__(self, kernel_size, stride=1, padding=0, use_ceil=False):
        check_sizes("MaxPool2d", kernel_size=kernel_size, stride=stride)
        take_fields(self, eqx.nn.MaxPool2d(kernel_size, stride, padding, use_ceil))

    def __call__(
        self, x: Inexact[Array, "channels h w"], *, key: PRNGKeyArray | None = None
    ) -> Inexact[Array, "channels rows columns"]:
        """One image, channels first. `key` is ignored."""
        del key
        x = jnp.asarray(x)
        if x.ndim != 3:
            expected = "one image [channels, height, width], without a batch axis"
            raise ValueError(explain("The input of `MaxPool2d` is invalid.", x.shape, expected))
        return jnp.moveaxis(self.channels_last(jnp.moveaxis(x, 0, -1)), -1, 0)

    def channels_last(
        self, x: Inexact[Array, "h w channels"]
    ) -> Inexact[Array, "rows columns channels"]:
        """The same of an image whose channels are its last axis."""
        padding = tuple(
            (a, b + s) if self.use_ceil and (n + a + b - k) % s else (a, b)
            for n, k, s, (a, b) in zip(
                x.shape[:2], self.kernel_size, self.stride, self.padding, strict=True
            )
        )
        if any(max(pad) > k for pad, k in zip(padding, self.kernel_size, strict=True)):
            expected = f"at most the kernel's size, {self.kernel_size}"
            raise RuntimeError(explain("`MaxPool2d(padding=...)` is too large.", padding, expected))
        # What no window reaches is cut off by padding with less than nothing.
        edges, counts = [], []
        for n, k, s, (a, b) in zip(
            x.shape[:2], self.kernel_size, self.stride, padding, strict=True
        ):
            count = max(0, (n + a + b - k) // s + 1)
            end = (count - 1) * s + max(k, s)
            edges.append((a, end - n - a))
            counts.append(count)
        if 0 in counts:
            return jnp.zeros((*counts, x.shape[2]), x.dtype)
        if any(a or b for a, b in edges):
            low = jnp.array(-np.inf, x.dtype)
            x = lax.pad(x, low, [(a, b, 0) for a, b in edges] + [(0, 0, 0)])
        apart = all(k <= s for k, s in zip(self.kernel_size, self.stride, strict=True))
        if apart:
            return _apart(x, self.kernel_size, self.stride)
        return _first_maximum(_views(x, self.kernel_size, self.stride))


def _views(x: Array, kernel: tuple[int, int], stride: tuple[int, int]) -> list[Array]:
    """For each position in a window, row by row, what all windows have there."""
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape, kernel, stride, strict=False))
    spans = (rows - 1) * stride[0] + 1, (columns - 1) * stride[1] + 1
    return [
        lax.slice(x, (i, j, 0), (i + spans[0], j + spans[1], x.shape[2]), (*stride, 1))
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def _keeps(a: Array, b: Array) -> Array:
    """Whether the maximum so far stays: the first of equal ones, and NaN for good."""
    return (a >= b) | (a != a)


def _first_maximum(views: list[Array]) -> Array:
    best = views[0]
    for view in views[1:]:
        best = jnp.where(_keeps(best, view), best, view)
    return best


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _apart(x: Array, kernel: tuple[int, int], stride: tuple[int, int]) -> Array:
    """Windows that do not overlap, `x` cut to whole strides."""
    return _first_maximum(_views(x, kernel, stride))


@_apart.defjvp
def _apart_jvp(kernel, stride, primals, tangents):
    (x,), (dx,) = primals, tangents
    views = _views(x, kernel, stride)
    # Small numbers are quick to move; a window of strides may have more places than they can count.
    kind = np.int8 if math.prod(stride) <= 128 else np.int32
    best, index = views[0], jnp.zeros(views[0].shape, kind)
    places = [i * stride[1] + j for i in range(kernel[0]) for j in range(kernel[1])]
    for place, view in zip(places[1:], views[1:], strict=True):
        keeps = _keeps(best, view)
        best = jnp.where(keeps, best, view)
        index = jnp.where(keeps, index, kind(place))
    # Which place of a window has the maximum, as a mask: its transpose writes each element of the
    # gradient once, in one pass, where that of a slice is a padded copy for every place.
    place = np.arange(stride[0] * stride[1], dtype=kind).reshape(1, stride[0], 1, stride[1], 1)
    rows, columns, channels = best.shape
    blocks = dx.reshape(rows, stride[0], columns, stride[1], channels)
    chosen = jnp.broadcast_to(index[:, None, :, None], blocks.shape) == place
    return best, jnp.sum(jnp.where(chosen, blocks, jnp.zeros((), dx.dtype)), axis=(1, 3))
