from ._conv4 import Conv4 as Conv4
from ._norm import BatchNorm as BatchNorm
from ._norm import SupportNorm as SupportNorm
from ._omniglot_fc import OmniglotFC as OmniglotFC
from ._resnet12 import ResNet12 as ResNet12
