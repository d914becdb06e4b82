from ._episodes import Episodes as Episodes
from ._sinusoid import Sinusoid as Sinusoid
