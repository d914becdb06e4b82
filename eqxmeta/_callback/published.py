"""What callbacks log with `run.log`, and how a monitor finds its number among it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .._errors import explain

# The mark of what is logged only because the run ends.
AT_END = "at_end"


@dataclass(frozen=True)
class Curve:
    """A metric over inner steps 0..K, for `run.log`: mean over tasks, and the half-width of its 95%
    interval."""

    mean: np.ndarray
    ci95: np.ndarray


@dataclass(frozen=True)
class Image:
    """A picture, for `run.log`: uint8 `[height, width, 3]`."""

    pixels: np.ndarray


@dataclass(frozen=True)
class Histogram:
    """How numbers are distributed, for `run.log`: all of them, `[n]`."""

    values: np.ndarray


Published: TypeAlias = "float | Curve | Image | Histogram"


def logged_value(values: Mapping[str, Any], monitor: str) -> float | None:
    """The number that `monitor` names among logged `values`, or `None`.

    `"eval/loss"` is that number, or the last point of that curve; `"eval/loss/after_1"` is the
    curve's point after 1 inner step.
    """
    curve, _, point = monitor.rpartition("/after_")
    if monitor in values:
        value, index = values[monitor], -1
    elif isinstance(values.get(curve), Curve) and point.isdecimal():
        value, index = values[curve], int(point)
    else:
        return None
    if isinstance(value, Image | Histogram):
        kind = "an image" if isinstance(value, Image) else "a histogram"
        message = f"The monitor {monitor!r} is {kind}."
        raise TypeError(explain(message, kind, "the name of a number or a curve"))
    if not isinstance(value, Curve):
        return float(value)
    if index >= len(value.mean):
        message, received = f"The monitor {monitor!r} is beyond the curve.", f"inner step {index}"
        expected = f"an inner step up to {len(value.mean) - 1}"
        raise ValueError(explain(message, received, expected))
    return float(value.mean[index])


def check_logged(scalars: Any, reserved: Collection[str]) -> None:
    """What `run.log` was given. Raises `TypeError`, and `ValueError` for a name of `reserved`."""
    expected = "a mapping from names to numbers, `Curve`s, `Image`s or `Histogram`s"
    message = "`run.log` was given something other than values by name."
    if not isinstance(scalars, Mapping):
        raise TypeError(explain(message, repr(scalars), expected))
    for name, value in scalars.items():
        if isinstance(name, str) and isinstance(value, Curve | Image | Histogram):
            _check_arrays(name, value)
        elif not isinstance(name, str) or np.ndim(value) or not _is_real(value):
            raise TypeError(explain(message, f"{name!r}: {value!r}", expected))
        if name in reserved:
            message = "`run.log` was given a name that is taken."
            others = ", ".join(sorted(reserved))
            expected = f"another name than {others}: these are the run's own"
            raise ValueError(explain(message, repr(name), expected))


def _is_real(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "biufV"  # V: bfloat16 and its kin


def _check_arrays(name: str, value: Curve | Image | Histogram) -> None:
    arrays = {key: np.asarray(array) for key, array in vars(value).items()}
    shapes = [array.shape for array in arrays.values()]
    if isinstance(value, Image):
        pixels = arrays["pixels"]
        sound = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        expected = "uint8 [height, width, 3]"
    elif isinstance(value, Curve):
        sound = all(map(_is_real, arrays.values())) and shapes[0] == shapes[1]
        sound = sound and len(shapes[0]) == 1 and shapes[0] != (0,)
        expected = "two arrays of numbers, `mean` and `ci95`, [inner_steps + 1] each"
    else:
        sound = _is_real(arrays["values"])
        expected = "an array of numbers"
    if not sound:
        received = ", ".join(f"{key}: {x.dtype.name}{list(x.shape)}" for key, x in arrays.items())
        message = f"`run.log` was given a malformed {type(value).__name__}, {name!r}."
        raise TypeError(explain(message, received, expected))
