"""Task sources: sine waves, few-shot classification episodes, minibatches, and several in one."""

from ._episodes import Episodes as Episodes
from ._minibatches import Minibatches as Minibatches
from ._sinusoid import Sinusoid as Sinusoid
from ._union import Union as Union
