from ._norm import BatchNorm as BatchNorm
from ._norm import SupportNorm as SupportNorm
