"""Batch normalisation for tasks."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_int
from .._errors import explain
from .._model.support_statistics import (
    SupportLayer,
    TransductiveLayer,
    count_examples,
    mean_over_examples,
    support_statistics,
)

Statistics = tuple[Float[Array, " channels"], Float[Array, " channels"]]


class _ChannelNorm(eqx.Module):
    """Channel by channel: `weight * (x - mean) / sqrt(variance + eps) + bias`, with statistics that
    are a subclass's."""

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, *, eps: float = 1e-5):
        argument = f"{type(self).__name__}(channels=...)"
        channels = check_int(channels, argument, minimum=1, what="channels")
        self.weight = jnp.ones(channels)
        self.bias = jnp.zeros(channels)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "channels ..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "channels ..."]:
        return self._along(0, x)

    def channels_last(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        """The same of an example whose channels are its last axis."""
        return self._along(-1, x)

    @abc.abstractmethod
    def _statistics(self, x: Array, axis: int) -> Statistics:
        """Mean and variance of each channel, along `axis` of `x`."""

    def _along(self, axis: int, x: Array) -> Array:
        if x.ndim < 1 or x.shape[axis] != self.weight.shape[0]:
            channels = self.weight.shape[0]
            message = f"`{type(self).__name__}` was called with another number of channels."
            expected = f"[..., {channels}]" if axis else f"[{channels}, ...]"
            raise ValueError(explain(message, f"one example of shape {x.shape}", expected))
        with jax.numpy_dtype_promotion("standard"):
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        statistics = (*self._statistics(wide, axis), self.weight, self.bias)
        mean, variance, weight, bias = (s.astype(wide.dtype) for s in statistics)
        # One multiply-add a value: the factors are of one channel, the values of all its positions.
        scale = weight * jax.lax.rsqrt(variance + self.eps)
        shift = bias - mean * scale
        return (wide * _per_channel(scale, x, axis) + _per_channel(shift, x, axis)).astype(x.dtype)


class SupportNorm(_ChannelNorm, SupportLayer):
    """Normalises each channel with the statistics of a task's support set: batch normalisation
    (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1) that is not transductive.

    While a model adapts, mean and (biased) variance are those of the support examples, over
    examples and positions, under the weights as they are. A query is normalised with the
    statistics of the support set under the adapted weights: what is predicted for it does not
    depend on the other queries. (Where published code normalises queries by queries, its results
    are transductive: Nichol et al. 2018, arXiv 1803.02999, section 6.1.)

    It keeps nothing between tasks, and is differentiated through. The statistics, of the support
    set that is seen by `eqxmeta.losses.predict`, are put into the model that `inner_adapt` returns,
    into the field `statistics`; see `eqxmeta.with_support_statistics`.

    `x: [channels, ...]`, one example. Computed in float32 at least. `weight` (γ) starts at 1,
    `bias` (β) at 0; `eps` is added to the variance.

    Raises `ValueError` when called for one example, outside of `predict`, without statistics.
    """

    statistics: Any

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__(channels, eps=eps)
        self.statistics = None

    def _statistics(self, x: Array, axis: int) -> Statistics:
        return support_statistics(self, lambda: _batch_statistics(x, axis, "SupportNorm"))


class BatchNorm(_ChannelNorm, TransductiveLayer):
    """Batch normalisation with the statistics of whatever is predicted together, and with no
    others: Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1.

    Queries are normalised with the statistics of the query set, so that a prediction depends on
    the other queries: transductive, as in the code of MAML and Reptile. `Evaluation.transductive`
    records it. There are no running averages, and no prediction for a single example.

    `x: [channels, ...]`, one example of those that `eqxmeta.losses.predict` maps the model over.
    Computed in float32 at least. `weight` (γ) starts at 1, `bias` (β) at 0; `eps` is added to the
    variance.

    Raises `ValueError` when called outside of `predict`.
    """

    # Without it a type checker would take the fields for the arguments.
    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__(channels, eps=eps)

    def _statistics(self, x: Array, axis: int) -> Statistics:
        return _batch_statistics(x, axis, "BatchNorm")


def _batch_statistics(x: Array, axis: int, layer: str) -> Statistics:
    """Mean and variance over examples and positions, each `[channels]`."""
    if count_examples(layer) * x.size == x.shape[axis]:
        # A variance of zero: all that the channel would give is its bias, whatever comes in.
        message = f"`{layer}` has a single value for each channel."
        expected = "more examples at a time, or more positions"
        raise ValueError(explain(message, f"one example of shape {x.shape}", expected))
    positions = tuple(i for i in range(x.ndim) if i != axis % x.ndim)

    def mean(x: Array) -> Array:
        return mean_over_examples(jnp.mean(x, axis=positions))

    first = mean(x)
    return first, mean((x - _per_channel(first, x, axis)) ** 2)


def _per_channel(values: Array, x: Array, axis: int) -> Array:
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)
