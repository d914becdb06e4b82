"""MAML."""

import optax

from .._meta_gradient.inner_loop import InnerLoop
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.rollout_strategy import ByInnerLoop
from .._types import Loss


class MAML(GradientStrategy, ByInnerLoop):
    """Model-agnostic meta-learning: an initialisation from which `inner` adapts well.

        maml = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(1e-3))
        state = em.Trainer(maml, meta_batch_size=25).fit(model, tasks, steps=20_000)
        adapted = maml.inner_adapt(state.model, (x, y))  # a model of your own type

    Descends, with `optimizer`, the gradient in θ of the mean over tasks of
    `loss(inner(θ, support), query)`, through every inner step: Finn, Abbeel, Levine 2017
    (arXiv 1703.03400), algorithm 1 and equation 1.

    - `loss(model, batch, key) -> (scalar, metrics)`, for example `eqxmeta.losses.mse`.
    - `inner`: an `InnerLoop`, whose `gradient` is the mode of the meta-gradient.
    - `optimizer`: the outer optax optimizer. One that looks at a `value`, as
      `optax.contrib.reduce_on_plateau` does, gets the objective, the metric `loss`; a line search,
      which would need the objective elsewhere too, is refused before the run.
    - `task_chunk`: how many tasks are computed at a time, see `GradientStrategy`.
    - `learn`: what is meta-learnt, if not everything, see `Strategy`.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
