"""Joint training, then fine-tuning: the baseline."""

import equinox as eqx
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._keys import split_or_none
from .._meta_gradient.inner_loop import InnerLoop
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.outer_step import adapt_with_metrics, query_loss, stop_gradient
from .._strategy.rollout_strategy import ByInnerLoop, first_order
from .._task.task import Task
from .._types import Loss


class Joint(GradientStrategy, ByInnerLoop):
    """The naive baseline: one model for the examples of all tasks, then fine-tuning.

    The outer step descends the mean loss over support and query examples of all tasks together;
    nothing in it knows of adaptation. `inner_adapt` fine-tunes with `inner`. On sinusoids it
    learns their average ("pretrained" in Finn, Abbeel, Levine 2017, section 5.1).

    Metrics as for `MAML`, so that the two can be compared, and `pooled_loss`, which is what is
    descended. Arguments as for `MAML`; `inner.gradient` plays no part.
    """

    loss: Loss
    inner: InnerLoop = eqx.field(converter=first_order)
    optimizer: optax.GradientTransformation

    def task_loss(
        self, model: PyTree, task: Task, *, step: Int[Array, ""], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        pooled_key, report_key = split_or_none(key)
        adapt_key, query_key = split_or_none(report_key)
        pooled, _ = self.loss(model, task.pooled, pooled_key)
        frozen = stop_gradient(model)  # the rest is for reporting
        adapted, metrics = adapt_with_metrics(self, frozen, task.support, key=adapt_key)
        after, query_metrics = query_loss(self.loss, frozen, adapted, task, query_key)
        return pooled, {"loss": after, "pooled_loss": pooled, **metrics, **query_metrics}
