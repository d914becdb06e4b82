"""The field's backbones and layers, fast on a CPU under per-task weights."""

from ._conv import Conv2d as Conv2d
from ._conv4 import Conv4 as Conv4
from ._convert import fast as fast
from ._linear import Linear as Linear
from ._norm import BatchNorm as BatchNorm
from ._norm import SupportNorm as SupportNorm
from ._omniglot_fc import OmniglotFC as OmniglotFC
from ._pool import MaxPool2d as MaxPool2d
from ._resnet12 import ResNet12 as ResNet12
