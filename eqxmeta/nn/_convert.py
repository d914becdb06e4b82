"""Replaces Equinox's layers in a model by those of this package."""

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import PyTree

from .._errors import explain
from ._conv import Conv2d
from ._equinox import take_fields
from ._linear import Linear
from ._pool import MaxPool2d


def fast(model: PyTree) -> PyTree:
    """`model` with `eqxmeta.nn.Linear`, `Conv2d` and `MaxPool2d` in place of Equinox's linear
    layers (also those of an `eqx.nn.MLP`), convolutions and max-pools over two spatial axes: the
    same arrays at the same places, and the same results to rounding. Linear layers are faster
    where they are mapped over examples, convolutions and max-pools in a loop on a CPU.

    A layer that stands in several places stays one layer. Everything else is left as it is, as
    are instances of a user's own subclasses, which may compute something else.

    **Example**

        model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=key))
    """
    # One without arrays of its own, a pooling layer or a model of shapes, is a model too.
    if not any(map(_is_part, jax.tree.leaves(model, is_leaf=_is_part))):
        expected = "an instance of an Equinox module, or a pytree of them"
        raise TypeError(explain("`fast(model)` is not a model.", repr(model)[:200], expected))
    done: dict[int, Any] = {}

    def convert(x: Any) -> Any:
        if (cls := _faster(x)) is None:
            return x
        if id(x) not in done:
            done[id(x)] = take_fields(object.__new__(cls), x)
        return done[id(x)]

    return jax.tree.map(convert, model, is_leaf=lambda x: _faster(x) is not None)


def _is_part(x: Any) -> bool:
    return isinstance(x, eqx.Module) or eqx.is_array(x)


def _faster(x: Any) -> type | None:
    """The class that computes the same as the layer `x`, if there is one."""
    if type(x) is eqx.nn.Linear:
        return Linear
    if type(x) in (eqx.nn.Conv, eqx.nn.Conv2d) and x.num_spatial_dims == 2:
        return Conv2d
    if type(x) is eqx.nn.MaxPool2d or _is_max_pool(x):
        return MaxPool2d
    return None


def _is_max_pool(x: Any) -> bool:
    return (
        type(x) is eqx.nn.Pool
        and x.num_spatial_dims == 2
        and x.operation is lax.max
        and isinstance(x.init, float)
        and x.init == -float("inf")
    )
