"""What is logged, as the summaries of TensorBoard's event files."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._errors import explain, warn
from .._files.event_file import proto
from .published import Curve

# tensorboardX is imported when it is used: it imports torch wherever that is installed.

# TensorBoard groups tags by what comes before the first slash, in alphabetical order. What is in
# this group comes after `eval` and `train`.
DETAILS = "within_task"
# A metric before adaptation, or of one inner step.
DETAIL = re.compile(r"_before$|/\d+$")
# Of a histogram; TensorBoard draws about as many.
_BINS = 30


def points(name: str, curve: Curve) -> dict[str, float]:
    """What is drawn of a curve against outer steps, by tag. Of the interval only that of the last
    point: then the tags of a metric are the same for any number of inner steps."""
    mean, half = np.asarray(curve.mean, float).tolist(), float(curve.ci95[-1])
    value, low, high = band(name)
    after = {f"{DETAILS}/{name}/after_{i}": x for i, x in enumerate(mean)}
    return {value: mean[-1], low: mean[-1] - half, high: mean[-1] + half, **after}


def band(name: str) -> list[str]:
    return [name, f"{DETAILS}/{name}/ci95_low", f"{DETAILS}/{name}/ci95_high"]


def inner_band(name: str) -> list[str]:
    """Of the newest curve, whose x axis is the inner step."""
    return [f"{DETAILS}/{name}", f"{DETAILS}/{name}_low", f"{DETAILS}/{name}_high"]


def layout(names: list[str]) -> list[Any]:
    """Of "Custom scalars"; TensorBoard takes the newest of a run, and merges those of several."""
    from tensorboardX.summary import custom_scalars

    points = {name: re.escape(f"{DETAILS}/{name}/after_") + r"\d+$" for name in names}
    layout = {
        "adapted, with 95% interval": {name: ["Margin", band(name)] for name in names},
        "newest evaluation, by inner step": {
            f"{name}, by inner step": ["Margin", inner_band(name)] for name in names
        },
        "after each inner step": {name: ["Multiline", [tag]] for name, tag in points.items()},
    }
    return list(custom_scalars(layout).value)


def scalars(numbers: Any) -> list[Any]:
    """Of pairs of tag and number, but for NaN."""
    value = proto("summary").Summary.Value
    return [value(tag=tag, simple_value=x) for tag, x in numbers if x == x]


# What a run is in a few words, where the user has none.
_BRIEF = "strategy", "inner_steps", "meta_batch_size", "seed", "steps"


def hparams(own: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    from tensorboardX.summary import hparams as summaries

    # TensorBoard has first what differs between runs, whatever its name: beside the user's own,
    # which may be the same in all of them, the run's would take their place.
    shown = own or {name: config[name] for name in _BRIEF if name in config}
    # Of tensorboardX's three summaries only the values. The declaration of metrics is left out:
    # TensorBoard then offers all scalars, also those that nobody knows yet.
    _, session_start, _ = summaries({k: _plain(v) for k, v in shown.items()}, {})
    return list(session_start.value)


def configuration(config: Mapping[str, Any]) -> list[Any]:
    """As a table in the tab "Text"."""
    from tensorboardX.summary import text

    lines = [
        f"| {name} | {str(_plain(value)).replace('|', chr(92) + '|')} |"
        for name, value in config.items()
        if name != "fingerprint" and value is not None
    ]
    return list(text("configuration", "\n".join(["| | |", "| --- | --- |", *lines])).value)


def _plain(value: Any) -> str | bool | int | float:
    """What the HParams tab can show; anything else would be dropped there without a word."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | bool | int | float) else str(value)


def image(name: str, pixels: np.ndarray) -> list[Any]:
    from tensorboardX.summary import image as summary

    try:
        return list(summary(name, np.asarray(pixels), dataformats="HWC").value)
    except ImportError as error:  # no reason to end a run that may have taken hours
        expected = "Pillow, which encodes pictures: pip install pillow"
        warn(explain(f"TensorBoard leaves out the picture {name!r}.", repr(error), expected))
        return []


def histogram(name: str, values: np.ndarray) -> list[Any]:
    from tensorboardX.summary import histogram as summary

    values = np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]  # a mask's -inf has no place on an axis
    if not values.size:
        return []
    # In halves, for the width of the range may be more than the largest number.
    edges = 2 * np.linspace(values.min() / 2, values.max() / 2, _BINS + 1)
    with np.errstate(over="ignore"):
        return list(summary(name, values, bins=edges).value)
