"""First-order MAML."""

import equinox as eqx
import optax

from .._meta_gradient.inner_loop import InnerLoop
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.rollout_strategy import ByInnerLoop, first_order
from .._types import Loss


class FOMAML(GradientStrategy, ByInnerLoop):
    """First-order MAML: MAML whose inner gradients count as constants.

    The meta-gradient is the query loss's gradient at the adapted parameters, and nothing of the
    inner loop is kept for it: Finn, Abbeel, Levine 2017 (arXiv 1703.03400), section 5.2.
    Arguments as for `MAML`; whatever `inner.gradient` says, `"first_order"` is used.
    """

    loss: Loss
    inner: InnerLoop = eqx.field(converter=first_order)
    optimizer: optax.GradientTransformation
