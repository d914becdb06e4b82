"""R2-D2: ridge regression on learnt features, in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._errors import explain
from .._model.features import features
from .._model.state import MetaParameters, meta_parameters
from .._strategy.classes import Classifies, labelled_examples, memberships, num_classes
from .._strategy.head_predictor import HeadPredictor, LinearHead
from .._task.examples import examples
from .._task.task import shapes_of
from .._types import Loss

_SCALE = 10.0  # before training: of logits that are about 1 for the right class and 0 for others


class R2D2(Classifies):
    """R2-D2: an embedding on whose features ridge regression solves a task.

    Bertinetto, Henriques, Torr, Vedaldi 2019 (arXiv 1805.08136), equations 4 to 6. In each task the
    support set's features, with a one appended to each (as in the paper's code), are the rows of X,
    its targets those of Y, and

        W = argmin ‖XW - Y‖² + λ‖W‖² = (XᵀX + λ)⁻¹ XᵀY = Xᵀ(XXᵀ + λ)⁻¹ Y,

    of which the form is computed that has the smaller matrix: of features or of examples. The outer
    step descends `loss` on the query set through that solution, in the embedding, in λ, and in α,
    below.

    The model that is trained is the embedding, one example to an array, which counts as a vector.
    `inner_adapt` returns a `HeadPredictor`, one example to outputs. The targets say what a task
    is:

    - integers `y: [n]` from 0: classification. Y is one-hot and the logits are `α (f(x), 1) W`.
      (The paper's shift β, of all logits, changes no softmax and is left out.)
    - floating point, `y: [n, k]`: regression, for a loss such as `eqxmeta.losses.mse`. Y is y, and
      the prediction, `[k]`, is `(f(x), 1) W`.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, the logarithms
    `log_lambda` and `log_scale` of λ and α, which begin with 1 and 10.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`; or of a regression.
    - `optimizer`, `task_chunk`, `learn`: as for `ProtoNet`. λ and α are always learnt.
    - `ways`: the number of logits, as for `ProtoNet`. A class that is not in the support set has a
      logit of minus infinity.

    Before adaptation nothing predicts, as in `ProtoNet`.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    loss: Loss
    optimizer: optax.GradientTransformation

    def meta_model(self, model: PyTree) -> MetaParameters:
        logarithms = {"log_lambda": jnp.zeros(()), "log_scale": jnp.log(_SCALE)}
        return MetaParameters(model, logarithms)

    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> HeadPredictor:
        x, y, weight = examples(support)
        if not jnp.issubdtype(y.dtype, jnp.floating):
            labelled = labelled_examples(support)
            return self._predictor(model, labelled, num_classes(y, self.ways), key)
        if y.ndim != 2:
            expected = "labels, integers `[n]`; or numbers `[n, k]`, `y[:, None]` of one an example"
            raise ValueError(explain("The targets of `R2D2` are invalid.", shapes_of(y), expected))
        return self._predictor(model, (x, y, weight), None, key)

    @eqx.filter_jit
    def _predictor(
        self,
        model: PyTree,
        support: tuple[PyTree, Array, Array | None],
        classes: int | None,
        key: PRNGKeyArray | None,
    ) -> HeadPredictor:
        learnt, (x, y, weight) = meta_parameters(model, "R2D2"), support
        found, embedding = features(learnt.model, x, key=key, weight=weight)
        penalty, scale = (jnp.exp(learnt.extra[name]) for name in ("log_lambda", "log_scale"))
        if classes is None:
            weight, present = jnp.ones(len(y)) if weight is None else weight, None
        else:
            y, weight, present = memberships(y, weight, classes, found.dtype)
        w = ridge(found, y, weight, penalty)
        w = w if classes is None else scale.astype(w.dtype) * w
        return HeadPredictor(embedding, LinearHead(w[:-1].T, w[-1]), present)


def ridge(
    features: Float[Array, "n d"],
    y: Float[Array, "n k"],
    weight: Float[Array, " n"],
    penalty: Float[Array, ""],
) -> Float[Array, "d+1 k"]:
    """`W` of the least `Σ_i weight_i ‖(f_i, 1) W - y_i‖² + penalty ‖W‖²`; its last row is the bias.
    Computed in float32 at least."""
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    root, penalty = jnp.sqrt(weight).astype(dtype)[:, None], penalty.astype(dtype)
    rows = root * jnp.pad(features.astype(dtype), ((0, 0), (0, 1)), constant_values=1)
    targets = root * jnp.where(root > 0, y.astype(dtype), 0)
    n, d = rows.shape

    def solve(gram: Array, right: Array) -> Array:
        regular = gram + penalty * jnp.eye(len(gram), dtype=dtype)
        return jax.scipy.linalg.solve(regular, right, assume_a="pos")

    if n <= d:
        return rows.T @ solve(rows @ rows.T, targets)
    return solve(rows.T @ rows, rows.T @ targets)
