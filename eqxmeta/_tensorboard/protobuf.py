"""The protocol buffers of TensorBoard's event files, as tensorboardX supplies them.

Each is imported when it is first used: tensorboardX imports torch wherever that is installed, and
nobody should wait seconds for it who only imports the callbacks.
"""

import importlib
from typing import Any

_WHERE = {
    "CRC_TABLE": "tensorboardX.crc32c",
    "crc32c": "tensorboardX.crc32c",
    "Event": "tensorboardX.proto.event_pb2",
    "SessionLog": "tensorboardX.proto.event_pb2",
    "Summary": "tensorboardX.proto.summary_pb2",
    "SummaryMetadata": "tensorboardX.proto.summary_pb2",
    "HistogramProto": "tensorboardX.proto.summary_pb2",
    "Layout": "tensorboardX.proto.layout_pb2",
    "Category": "tensorboardX.proto.layout_pb2",
    "Chart": "tensorboardX.proto.layout_pb2",
    "MarginChartContent": "tensorboardX.proto.layout_pb2",
    "hparams": "tensorboardX.summary",
    "custom_scalars": "tensorboardX.summary",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value  # found without this function from now on
    return value
