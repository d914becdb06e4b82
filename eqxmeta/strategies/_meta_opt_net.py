"""MetaOptNet: a support vector machine on learnt features."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_number
from .._meta_gradient.crammer_singer import crammer_singer
from .._model.features import features
from .._model.state import MetaParameters, meta_parameters
from .._strategy.classes import ByFeatures, LabelledExamples, memberships
from .._strategy.head_predictor import HeadPredictor, LinearHead
from .._types import Number

_SCALE = 10.0  # before training: the logits of classes that a margin parts differ by 1 without it


def _check_cost(cost: Any) -> Number:
    return check_number(cost, "MetaOptNet(cost=...)", positive=True)


class MetaOptNet(ByFeatures):
    """MetaOptNet-SVM: an embedding on whose features a support vector machine solves a task.

    Lee, Maji, Ravichandran, Soatto 2019 (arXiv 1904.03758), equations 9 to 12. The support set is
    classified by the linear machine of several classes of Crammer and Singer,

        min ½ Σ_k ‖w_k‖² + C Σ_i ξ_i,  w_y·f(x_i) - w_k·f(x_i) ≥ 1 - ξ_i - [k = y]  (y = y_i),

    which is convex. Its dual is solved by an interior-point method, to 1e-5 in float32, 1e-10 in
    float64, and differentiated at the optimum by the implicit function theorem: through the support
    vectors, whatever way has led there. The outer step descends `loss` on the query set in the
    embedding and in γ, the scale of the logits `γ w_k·f(x)`.

    The model that is trained is the embedding f, one example to an array, which counts as a vector.
    `inner_adapt` returns a `HeadPredictor`, one example to logits. Tasks are classification
    tasks, `(x, y)` with integer labels `y: [n]` from 0. (The paper trains with more shots than it
    tests.)

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, the logarithm
    `log_scale` of γ, which begins with 10; in the paper's code with 1.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `optimizer`, `task_chunk`, `learn`: as for `ProtoNet`. γ is always learnt.
    - `cost`: C, of an example on the wrong side of the margin; the paper's code has 0.1.
    - `ways`: the number of logits, as for `ProtoNet`. A class that is not in the support set has a
      logit of minus infinity.

    A step costs time in proportion to ways times the third power of the support set's size. Before
    adaptation nothing predicts, as in `ProtoNet`.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    cost: Number = eqx.field(default=0.1, kw_only=True, converter=_check_cost)

    def meta_model(self, model: PyTree) -> MetaParameters:
        return MetaParameters(model, {"log_scale": jnp.log(_SCALE)})

    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> HeadPredictor:
        learnt, (x, y, weight) = meta_parameters(model, "MetaOptNet"), support
        found, embedding = features(learnt.model, x, key=key, weight=weight)
        member, weight, present = memberships(y, weight, classes, found.dtype)
        w, _ = crammer_singer(found, member, present, weight, self.cost)
        w = jnp.exp(learnt.extra["log_scale"]).astype(w.dtype) * w
        return HeadPredictor(embedding, LinearHead(w, jnp.zeros_like(w[:, 0])), present)
