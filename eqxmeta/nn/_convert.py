"""Replaces Equinox's layers in a model by those of this package."""

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import PyTree

from .._errors import explain
from . import _conv, _pool


def fast(model: PyTree) -> PyTree:
    """`model` with `eqxmeta.nn.Conv2d` and `MaxPool2d` in place of Equinox's convolutions and
    max-pools over two spatial axes: the same arrays, the same results, fast in a loop on a CPU.

    A layer that stands in several places stays one layer. Everything else is left as it is, as
    are instances of a user's own subclasses, which may compute something else.

    **Example**

        model = em.nn.fast(model)
    """
    # One without arrays of its own, a pooling layer or a model of shapes, is a model too.
    if not any(map(_is_part, jax.tree.leaves(model, is_leaf=_is_part))):
        expected = "an instance of an Equinox module, or a pytree of them"
        raise TypeError(explain("`fast(model)` is not a model.", repr(model)[:200], expected))
    done: dict[int, Any] = {}

    def convert(x: Any) -> Any:
        if not _is_slow(x):
            return x
        if id(x) not in done:
            is_conv = isinstance(x, eqx.nn.Conv)
            done[id(x)] = _conv.from_equinox(x) if is_conv else _pool.from_equinox(x)
        return done[id(x)]

    return jax.tree.map(convert, model, is_leaf=_is_slow)


def _is_part(x: Any) -> bool:
    return isinstance(x, eqx.Module) or eqx.is_array(x)


def _is_slow(x: Any) -> bool:
    if type(x) in (eqx.nn.Conv, eqx.nn.Conv2d):
        return x.num_spatial_dims == 2
    if type(x) is eqx.nn.Pool:
        low = isinstance(x.init, float) and x.init == -float("inf")
        return x.num_spatial_dims == 2 and x.operation is lax.max and low
    return type(x) is eqx.nn.MaxPool2d
