"""Learnt rules of inner steps, for `LearntUpdate(rule=...)`: what they hold is meta-learnt.

Each is an `eqx.Module` with optax's two methods:

    init(params) -> state
    update(updates, state, params) -> (updates, state)

`params` and `updates` are trees of what adapts, with `None` elsewhere. `updates` are those of
`inner.optimizer`, descending: minus the gradient where that is `optax.sgd(1.0)`. What changes from
step to step, such as a count of them, is in the state, in arrays. Its `update` may also take
`value=`, the loss before the step.

All begin as the identity, so that training begins as MAML with the same `inner`.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ._arguments import check_int, check_number
from ._types import Number

__all__ = [
    "KroneckerBlocks",
    "LayerRates",
    "Rates",
    "UpdateNetwork",
]


def __dir__() -> list[str]:
    return __all__


class Rates(eqx.Module):
    """A rate for every number: `u <- α ∘ u` (Li et al. 2017, arXiv 1707.09835, equation 2).

    `rates` is a tree like `params`, all `rate` at first.
    """

    rates: PyTree

    def __init__(self, params: PyTree, rate: Number = 1.0):
        rate = check_number(rate, "Rates(rate=...)")
        self.rates = jax.tree.map(lambda x: jnp.full_like(x, rate), params)

    def init(self, params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(self, updates: PyTree, state: Any, params: PyTree = None):
        return jax.tree.map(lambda rate, u: rate * u, self.rates, updates), state


class LayerRates(eqx.Module):
    """A rate for every array and inner step: `u <- α_k u` in step k (LSLR of Antoniou et al. 2019,
    arXiv 1810.09502). After more than `steps` steps the last rate goes on.

    `rates` is a tree like `params` with `[steps]` for each array, all `rate` at first.
    """

    rates: PyTree

    def __init__(self, params: PyTree, steps: int, rate: Number = 1.0):
        steps = check_int(steps, "LayerRates(steps=...)", minimum=1, what="inner steps")
        rate = check_number(rate, "LayerRates(rate=...)")
        self.rates = jax.tree.map(lambda x: jnp.full(steps, rate, x.dtype), params)

    def init(self, params: PyTree) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def update(self, updates: PyTree, state: Int[Array, ""], params: PyTree = None):
        def times(rates: Array, u: Array) -> Array:
            return rates[jnp.minimum(state, rates.size - 1)] * u

        return jax.tree.map(times, self.rates, updates), optax.safe_increment(state)


class KroneckerBlocks(eqx.Module):
    """Square matrices along the axes of every array (Park, Oliva 2019, arXiv 1902.03356).

    - of a matrix `[out, in]`: `U <- M_o U M_i`;
    - of the weight of a convolution, `[out, in, *kernel]`: the same with `M_f` along the kernel,
      whose axes count as one: `U[o, i, f] <- Σ M_o[o, p] U[p, q, g] M_i[q, i] M_f[g, f]`;
    - of a bias, `[n]` or `[n, 1, 1]`: a rate for every number.

    `blocks` is a tree like `params` with a list of these for each array, identities at first.
    """

    blocks: PyTree

    def __init__(self, params: PyTree):
        self.blocks = jax.tree.map(_identities, params)

    def init(self, params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(self, updates: PyTree, state: Any, params: PyTree = None):
        return jax.tree.map(_transformed, updates, self.blocks), state


def _identities(x: Array) -> list[Array]:
    if x.ndim < 2 or (x.ndim == 3 and x.size == x.shape[0]):
        return [jnp.ones_like(x)]
    sizes = (*x.shape[:2], *([math.prod(x.shape[2:])] if x.ndim > 2 else []))
    return [jnp.eye(n, dtype=x.dtype) for n in sizes]


def _transformed(u: Array, blocks: list[Array]) -> Array:
    if len(blocks) == 1:
        return blocks[0] * u
    out, into, *kernel = blocks
    x = u.reshape(*u.shape[:2], -1)
    # At full precision, or identities would round on some devices.
    x = jnp.einsum("po,oif->pif", out, x, precision="highest")
    x = jnp.einsum("oif,iq->oqf", x, into, precision="highest")
    for m in kernel:
        x = jnp.einsum("oif,fg->oig", x, m, precision="highest")
    return x.reshape(u.shape)


class UpdateNetwork(eqx.Module):
    """A small network that makes the update of each number by itself: a learnt optimizer of the
    kind of Andrychowicz et al. 2016 (arXiv 1606.04474) and Metz et al. 2019 (arXiv 1810.10180).

    `u <- exp(a) u + b m`, where m is the mean of the updates so far with the weights of Adam's
    first moment (decay 0.9), and `(a, b)` are the outputs of the network, one hidden layer of
    `width` tanh units, for `(u / rms(u), m / rms(m), θ)`. (Root mean squares over an array.) Its
    last layer is zero at first. For real parameters.
    """

    network: eqx.nn.MLP

    def __init__(self, *, key: PRNGKeyArray, width: int = 16):
        width = check_int(width, "UpdateNetwork(width=...)", minimum=1, what="units")
        network = eqx.nn.MLP(3, 2, width, depth=1, activation=jnp.tanh, key=key)
        last = jax.tree.map(jnp.zeros_like, network.layers[-1])
        self.network = eqx.tree_at(lambda n: n.layers[-1], network, last)

    def init(self, params: PyTree) -> tuple[Int[Array, ""], PyTree]:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(self, updates: PyTree, state: tuple[Array, PyTree], params: PyTree):
        count, mean = state
        count = optax.safe_increment(count)
        mean = jax.tree.map(lambda m, u: 0.9 * m + 0.1 * u, mean, updates)

        def one(u: Array, m: Array, x: Array) -> Array:
            m = m / (1 - 0.9 ** jnp.asarray(count, m.dtype))
            features = jnp.stack([u / _rms(u), m / _rms(m), x], axis=-1)
            a, b = jnp.moveaxis(jax.vmap(self.network)(features.reshape(-1, 3)), -1, 0)
            return jnp.exp(a).reshape(u.shape) * u + b.reshape(u.shape) * m

        return jax.tree.map(one, updates, mean, params), (count, mean)


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(x**2) + jnp.finfo(x.dtype).tiny ** 0.5)
