"""Task sources: sine waves, and few-shot classification episodes."""

from ._episodes import Episodes as Episodes
from ._sinusoid import Sinusoid as Sinusoid
