"""CAVIA: the inner loop adapts context parameters, which begin at zero in every task."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._arguments import check_argument
from .._errors import explain
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._meta_gradient.select import selection
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.head import adapting
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Where
from .._types import Loss

_ARGUMENT = "CAVIA(context=...)"
_EXPECTED = "a function from the model to its context, such as `context=lambda m: m.context`"


class Context(eqx.Module):
    """What adapts: `where(model)`, or `model.context`."""

    where: Where | None
    argument: str = _ARGUMENT

    def __call__(self, model: PyTree) -> PyTree:
        if self.where is not None:
            return self.where(model)
        if not hasattr(model, "context"):
            message = f"`{self.argument}` is needed: the model does not say what its context is."
            received = f"`{type(model).__name__}`, without a field `context`"
            raise ValueError(explain(message, received, _EXPECTED))
        return model.context


class CAVIA(GradientStrategy, RolloutStrategy):
    """Fast context adaptation via meta-learning: what adapts is told apart from what is learnt.

    Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019 (arXiv 1810.03642), equations 4 and 5: in each
    task the context parameters φ begin at zero and adapt, `φ ← φ - α ∇_φ loss(φ, θ; support)`; the
    shared parameters θ stay, and the outer step descends `loss(φ_K, θ; query)` in θ, through the
    inner steps. φ is never meta-learnt: it has no outer gradient, no optimizer state and no decay.

    A model with a context is any model with a field `context` of arrays, as an additional input:

        class Net(eqx.Module):
            context: Array  # [4], zero in `TrainState.model`
            layers: eqx.nn.MLP  # eqx.nn.MLP(1 + 4, 1, 40, 2, key=key)

            def __call__(self, x):
                return self.layers(jnp.concatenate([x, self.context]))

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`; `inner.adapt` must be
      `None`. What `learn` chooses of the context is not learnt either.
    - `context`: from the model to its context, if it is not the field `context`:
      `lambda m: (m.scale, m.shift)`.

    `TrainState.model` is the user's model, its context at zero, whatever it was. What computes
    nothing from the context alone begins away from a saddle point: the weights by which it enters
    should not be zero, for its gradient is theirs.

    Raises `TypeError` or `ValueError` for arguments that are not as above, and `ValueError` when
    used with a model that has no such context, or nothing else that is learnt.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    context: Where | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        where = self.context
        sound = where is None or (callable(where) and not isinstance(where, type))
        check_argument(sound, where, _ARGUMENT, f"{_EXPECTED}; or None", TypeError)
        self.inner = adapting(self.inner, Context(where), _ARGUMENT)

    def meta_model(self, model: PyTree) -> PyTree:
        return self._at_zero(model)

    def unadapted(self, model: PyTree) -> PyTree:
        return self._at_zero(model)

    def learnt(self, model: PyTree) -> PyTree:
        context = selection(model, Context(self.context), _ARGUMENT)
        mask = jax.tree.map(lambda learnt, c: learnt and not c, super().learnt(model), context)
        if not any(jax.tree.leaves(mask)):
            message = "Nothing is learnt: `CAVIA` does not learn the context."
            expected = "floating-point arrays beside the context, and a `learn` that chooses some"
            raise ValueError(explain(message, f"a `{type(model).__name__}`", expected))
        return mask

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        return self.inner(self.loss, self._at_zero(model), support, **options)

    def _at_zero(self, model: PyTree) -> PyTree:
        context, others = self.inner.partition(model)
        return eqx.combine(jax.tree.map(jnp.zeros_like, context), others)
