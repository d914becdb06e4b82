"""What TensorBoard is told, as its protocol buffers."""

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import protobuf as pb

# Of a histogram; TensorBoard draws about as many.
_BINS = 30


def tags_of(name: str, inner_step: int) -> tuple[str, str, str]:
    after = f"{name}/after_{inner_step}"
    return after, f"ci95/{after}_low", f"ci95/{after}_high"


def scalars_summary(numbers: Mapping[str, float]) -> Any:
    return pb.Summary(value=[pb.Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()])


def hparams_summary(hparams: Mapping[str, Any]) -> Any:
    # Of tensorboardX's three summaries only the values. The declaration of metrics is left out:
    # TensorBoard then offers all scalars, also those that nobody knows yet.
    _, session_start, _ = pb.hparams({k: _plain(v) for k, v in hparams.items()}, {})
    return session_start


def _plain(value: Any) -> str | bool | int | float:
    """What the HParams tab can show; anything else would be dropped there without a word."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | bool | int | float) else str(value)


def layout_summary(curves: Mapping[str, int]) -> Any:
    """Charts with bands, one a curve. TensorBoard takes the newest layout of a run."""
    margin = pb.MarginChartContent
    charts = []
    for name, length in curves.items():
        tags = [tags_of(name, i) for i in range(length)]
        series = [margin.Series(value=v, lower=low, upper=high) for v, low, high in tags]
        charts.append(pb.Chart(title=name, margin=margin(series=series)))
    category = pb.Category(title="adaptation, 95% intervals", chart=charts)
    value = pb.custom_scalars({}).value[0]
    content = pb.Layout(category=[category])
    value.tensor.string_val[0] = content.SerializeToString()
    return pb.Summary(value=[value])


def image_summary(name: str, pixels: np.ndarray) -> Any:
    height, width, _ = pixels.shape
    png = _png(pixels)
    image = pb.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    metadata = pb.SummaryMetadata(plugin_data=pb.SummaryMetadata.PluginData(plugin_name="images"))
    return pb.Summary(value=[pb.Summary.Value(tag=name, image=image, metadata=metadata)])


def histogram_summary(name: str, values: np.ndarray) -> Any:
    """Of finite float64 `values: [n]`."""
    # In halves, for the width of the range may be more than the largest number; and not narrower
    # than what 30 bins can share.
    low, high = values.min() / 2, values.max() / 2
    least = 1e-9 * max(abs(low), abs(high))
    margin = 0.0 if high - low > least else max(0.25, least)
    counts, edges = np.histogram(values / 2, bins=_BINS, range=(low - margin, high + margin))
    with np.errstate(over="ignore"):
        total, squares = values.sum(), (values**2).sum()
    # A bucket is named by its upper end; the first, empty one says where the second begins.
    histogram = pb.HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=total,
        sum_squares=squares,
        bucket_limit=(2 * edges).tolist(),
        bucket=[0, *counts.tolist()],
    )
    return pb.Summary(value=[pb.Summary.Value(tag=name, histo=histogram)])


def _png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 `[height, width, 3]`, without an imaging library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    height, width, _ = pixels.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line is led by its filter: none
    lines[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(lines.tobytes())
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
