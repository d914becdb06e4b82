"""What the layers here take over from Equinox's of the same name."""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import numpy as np

from .._errors import explain

Layer = TypeVar("Layer", bound=eqx.Module)


def take_fields(to: Layer, layer: Any) -> Layer:
    """`to`, a module that is being made, with the very arrays and settings of Equinox's `layer`,
    which has read and checked its arguments."""
    for name in type(to).__dataclass_fields__:
        object.__setattr__(to, name, getattr(layer, name))
    return to


def check_sizes(layer: str, **sizes: Any) -> None:
    """Sizes along the two axes of an image, each a number or a pair, as Equinox takes them.

    Equinox itself does not look at their values; what comes of them is an empty image."""
    for name, value in sizes.items():
        values = value if isinstance(value, Sequence) else [value]
        if any(isinstance(number, int | np.integer) and number < 1 for number in values):
            message, expected = f"`{layer}({name}=...)` is too small.", "1 or more, along each axis"
            raise ValueError(explain(message, repr(value), expected))
