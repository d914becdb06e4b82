"""Sizes that are one number or one per axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._errors import explain


def check_sizes(layer: str, **sizes: Any) -> None:
    """Sizes along the two axes of an image, each a number or a pair, as Equinox takes them.

    Equinox itself does not look at their values; what comes of them is an empty image."""
    for name, value in sizes.items():
        values = value if isinstance(value, Sequence) else [value]
        if any(isinstance(number, int | np.integer) and number < 1 for number in values):
            message, expected = f"`{layer}({name}=...)` is too small.", "1 or more, along each axis"
            raise ValueError(explain(message, repr(value), expected))
