"""MAML++: MAML with learnt rates, the loss of every inner step, and first order at first."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_int
from .._keys import split_or_none
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.state import MetaParameters, meta_parameters
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.outer_step import query_loss
from .._strategy.rollout_strategy import RolloutStrategy
from .._task.task import Task
from .._types import Loss
from ..rules import LayerRates

# The share of its first weight that the loss of an inner step before the last keeps at least, until
# it is left out: the paper's code.
_FLOOR = 0.03


def _check_anneal(value: Any) -> int:
    return check_int(value, "MAMLPlusPlus(anneal=...)", minimum=0, what="outer steps")


def _check_first_order(value: Any) -> int:
    return check_int(value, "MAMLPlusPlus(first_order=...)", minimum=0, what="outer steps")


class MAMLPlusPlus(GradientStrategy, RolloutStrategy):
    """MAML++: MAML made stable and quick to train.

    Antoniou, Edwards, Storkey 2019 (arXiv 1810.09502), section 4:

    - A rate for each layer and inner step is learnt (LSLR): inner step k adds to the array `w` of
      the model `rates_w[k]` times the update of `inner.optimizer`. The rates begin with 1, so that
      `optax.sgd(0.1)` is the paper's start. After more steps than were trained with, the last rate
      goes on, which need not descend: rates are of either sign. On sinusoids with one inner step
      three arrays of six had negative ones; the loss fell from 0.27 to 0.10 by step 3, and grew
      from the fourth on, to 1.4 after 6 steps.
    - In the first `anneal` outer steps the query losses after all K inner steps are descended
      (MSL), `Σ_k v_k loss(θ_k; query)`. At outer step t, as in the paper's code, `v_k = max(1 - t /
      anneal, 0.03) / K` for k < K, and `v_K` is the rest to 1. Afterwards it is the loss after the
      last step, as in MAML.
    - In the first `first_order` outer steps inner gradients count as constants (DA): no second
      derivatives are computed. In the paper these are the first 50 epochs.
    - The outer rate follows a cosine (CA), an outer optimizer:
      `optax.adam(optax.cosine_decay_schedule(1e-3, steps))`.
    - With `eqxmeta.nn.SupportNorm` every inner step normalises by statistics of its own, those of
      the support set under the weights of that step, in the place of the paper's running ones
      (BNRS). Its gains and biases for each step (BNWB) are left out: a layer is not told the step.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, the rates, an
    `eqxmeta.rules.LayerRates`.

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`. Every rate is learnt.
    - `anneal`, `first_order`: outer steps, 0 or more. The losses along the way cost memory and time
      for the query set at every inner step; `InnerLoop(remat=)` saves the memory.

    Metrics as of `MAML`: `loss` is that after the last inner step, `objective` what is descended.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    anneal: int = eqx.field(default=1000, kw_only=True, converter=_check_anneal)
    first_order: int = eqx.field(default=0, kw_only=True, converter=_check_first_order)

    def meta_model(self, model: PyTree) -> MetaParameters:
        fast, _ = self.inner.partition(model)
        return MetaParameters(model, LayerRates(fast, self.inner.steps))

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        learnt = meta_parameters(model, "MAMLPlusPlus")
        rated = optax.chain(self.inner.optimizer, learnt.extra)
        return self.inner(self.loss, learnt.model, support, optimizer=rated, **options)

    def task_loss(
        self, model: PyTree, task: Task, *, step: Int[Array, ""], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        adapt_key, query_key = split_or_none(key)

        def measure(model: PyTree, before: PyTree | None = None):
            return query_loss(self.loss, before, model, task, query_key)

        def of_last(**options):
            end = self.inner_rollout(model, task.support, key=adapt_key, **options)
            loss, metrics = measure(end.model, self.unadapted(model))
            return loss, {"loss": loss, "support_loss": end.losses, **metrics}

        def of_all(**options):
            options |= {"key": adapt_key, "observe": measure}
            path = self.inner_rollout(model, task.support, **options)
            losses, metrics = path.observed  # `[K + 1]` each
            share = jnp.maximum(1 - step.astype(float) / self.anneal, _FLOOR) / self.inner.steps
            early = share.astype(losses.dtype)
            last = 1 - (self.inner.steps - 1) * early
            objective = early * jnp.sum(losses[1:-1]) + last * losses[-1]
            values = {"loss": losses, **metrics}
            before = {f"{name}_before": x[0] for name, x in values.items()}
            after = {name: x[-1] for name, x in values.items()}
            return objective, {"support_loss": path.losses, **before, **after}

        anneal = self.anneal if self.inner.steps > 1 else 0
        starts = sorted({0, anneal, self.first_order})
        phases = [
            functools.partial(
                of_all if start < anneal else of_last,
                gradient="first_order" if start < self.first_order else None,
            )
            for start in starts
        ]
        # The step has no task axis: also under `vmap` one phase is computed, not a choice of all.
        phase = jnp.sum(step >= jnp.array(starts[1:], jnp.int32))
        return jax.lax.switch(phase, phases)
