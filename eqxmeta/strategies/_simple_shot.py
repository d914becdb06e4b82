"""SimpleShot: class-wide pretraining, then nearest centroids of normalised features."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._model.features import embedded, features
from .._model.state import own_model
from .._strategy.by_distance import PrototypeClassifier, squared_euclidean
from .._strategy.classes import ByFeatures, LabelledExamples, prototypes
from .._strategy.head_predictor import LinearHead
from .._strategy.pretraining import Pretraining, unit, zero_head


class Normalised(eqx.Module):
    """`f(x) - mean`, divided by its length. `mean`: `None` is zero."""

    embedding: PyTree
    mean: Float[Array, " features"] | None

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " features"]:
        return self.of_features(embedded(self.embedding, x, key))

    def of_features(self, features: Float[Array, " features"]) -> Float[Array, " features"]:
        return unit(features if self.mean is None else features - self.mean)


def _check_center(center: Any) -> Any:
    leaves = jax.tree.leaves(center)
    sound = all(eqx.is_array_like(x) and jnp.ndim(x) > 0 and jnp.size(x) for x in leaves)
    sound = sound and all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves)
    expected = "floating-point examples `[n, ...]` as the model takes them, such as "
    expected += "`minibatches.sample(key).query[0]`; or None"
    check_argument(sound, center, "SimpleShot(center=...)", expected, TypeError)
    return jax.tree.map(jnp.asarray, center)


class SimpleShot(Pretraining, ByFeatures):
    """Pretraining on all classes, then the nearest centroid of features of length one.

    Wang, Chao, Weinberger, van der Maaten 2019 (arXiv 1911.04623), section 3: the body and a linear
    head of `classes` logits are trained on ordinary minibatches, those of
    `eqxmeta.tasks.Minibatches`. In a task features are centred by their mean over training
    examples, x̄, and divided by their length, `z = (f(x) - x̄) / ‖f(x) - x̄‖` ("CL2N"; without
    x̄ "L2N"); `c_k` is the mean of z over the support examples of class k, and the nearest one wins:
    the logits are `-‖z - c_k‖²`.

    The model that is trained is the body, an embedding: one example to an array, which counts as a
    vector. `TrainState.model` is `MetaParameters(body, head)` with the head of the training
    classes; `inner_adapt` returns a `PrototypeClassifier`, one example to logits. A body that was
    trained elsewhere is evaluated as it is: `em.evaluate(strategy, body, episodes)`; with features
    for images it is `eqx.nn.Identity()`.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `optimizer`, `task_chunk`, `learn`: as for `MAML`. The outer step sees `meta_batch_size`
      minibatches.
    - `center`: training examples `[n, ...]`, as the model takes them, over whose features x̄ is the
      mean: some hundreds, `minibatches.sample(key).query[0]`; of features computed elsewhere all,
      or their mean, `[1, features]`. `None`: x̄ is zero. No mean is kept: each adaptation computes
      that of the body as it is, so that it is right also while the body is trained, at the cost of
      n more examples. Layers that normalise by a batch take these n for it.
    - `classes`, `features`, `ways`: as for `Baseline`.

    Metrics in training are those of the minibatch: `loss`, `accuracy`, `grad_norm`. Few-shot tasks
    are for `Evaluate`, of held-out classes.

    Raises `TypeError` or `ValueError` for arguments that are not as above, for tasks with a support
    set in training, and when trained without `classes` and `features`. A support label outside
    `range(ways)` makes every logit NaN.
    """

    center: PyTree = eqx.field(default=None, kw_only=True, converter=_check_center)

    def new_head(self, classes: int, features: int) -> LinearHead:
        return zero_head(classes, features)

    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> PrototypeClassifier:
        (x, y, weight), body = support, own_model(model)
        mean = None
        if self.center is not None:
            of_center, _ = features(eqx.nn.inference_mode(body), self.center)
            mean = jnp.mean(of_center, axis=0)
        found, body = features(body, x, key=key, weight=weight)
        embedding = Normalised(body, mean)
        centroids = prototypes(jax.vmap(embedding.of_features)(found), y, weight, classes)
        return PrototypeClassifier(embedding, squared_euclidean, *centroids)
