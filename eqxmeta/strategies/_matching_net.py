"""Matching networks."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._model.features import embedded
from .._model.features import features as features_of
from .._strategy.by_distance import ByDistance, Distance
from .._strategy.classes import labelled_examples, num_classes


class MatchingClassifier(eqx.Module):
    """Maps one example to logits `[classes]`, up to a constant the logarithms of the attention that
    the examples of each class get: `log Σ_i w_i exp(-d(f(x), f(x_i)))` over those of class k.

    - `embedding`: f, the user's own model. `distance`: d.
    - `features`: `[n, features]`, f(x_i) of the support set.
    - `member`: `[n, classes]`, whether example i is of class k. The logit of a class without
      examples is minus infinity.
    - `log_weight`: `[n]`, `log w_i`.
    """

    embedding: PyTree
    distance: Distance
    features: Float[Array, "n features"]
    member: Bool[Array, "n classes"]
    log_weight: Float[Array, " n"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " classes"]:
        feature = embedded(self.embedding, x, key)
        distances = jax.vmap(lambda other: self.distance(feature, other))(self.features)
        present = jnp.any(self.member, axis=0)
        # Of a class without examples the sum is that of all, for the logarithm of nothing has no
        # derivative.
        counted = self.member | ~present[None, :]
        scores = jnp.broadcast_to((self.log_weight - distances)[:, None], counted.shape)
        return jnp.where(present, jax.nn.logsumexp(scores, axis=0, where=counted), -jnp.inf)


class MatchingNet(ByDistance):
    """Matching networks: a query has the labels of the support examples that it is like.

    Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016 (arXiv 1606.04080), equation 1:
    `p(y = k | x) = Σ_i a(x, x_i) [y_i = k]`, with attention `a`, the softmax over the support set
    of `s cos(f(x), f(x_i))`. There is no inner gradient; the outer step descends `loss` on the
    query set in the parameters of f.

    The model that is trained is f: one example to an array, which counts as a vector. `inner_adapt`
    returns a `MatchingClassifier`, one example to logits. Tasks are as for `ProtoNet`: with one
    shot, and the same distance, it is the same; with more, every example counts by itself.

    - `loss`, `optimizer`, `task_chunk`, `learn`, `ways`: as for `ProtoNet`.
    - `distance`: minus what the attention is a softmax of. `"cosine"`, the default, is
      `-s cos(f(x), f(x_i))` with a learnt scale s, at first 10; the paper's has none:
      `distance=lambda a, b: -optax.losses.cosine_similarity(a, b)`. Others as for `ProtoNet`.

    Without the paper's full context embeddings: they read the support set in an order, by a
    recurrent network, and so depend on it.

    Before adaptation there is no classifier: no metric `loss_before`, and in an `Evaluation` the
    column of step 0 is NaN; that of step 1 is what counts. `TrainState.model` is a `MetaParameters`
    of `model`, f, and `extra`, the distance, if that is learnt; otherwise f.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    distance: Literal["euclidean", "cosine"] | Distance = eqx.field(default="cosine", kw_only=True)

    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> MatchingClassifier:
        x, y, weight = labelled_examples(support)
        embedding, distance = self.embedding_and_distance(model)
        classes = num_classes(y, self.ways)
        return _classifier(embedding, distance, x, y, weight, classes, key)


@eqx.filter_jit
def _classifier(
    embedding: PyTree,
    distance: Distance,
    x: PyTree,
    y: Array,
    weight: Array | None,
    classes: int,
    key: PRNGKeyArray | None,
) -> MatchingClassifier:
    features, embedding = features_of(embedding, x, key=key, weight=weight)
    weight = jnp.ones(y.shape) if weight is None else weight
    exists = weight > 0
    log_weight = jnp.log(jnp.where(exists, weight, 1)).astype(features.dtype)
    member = jax.nn.one_hot(y, classes, dtype=bool) & exists[:, None]
    # A label without a class would only be left out: NaN instead of a plausible classifier.
    wrong = jnp.any(exists & ((y < 0) | (y >= classes)))
    log_weight = jnp.where(wrong, jnp.nan, log_weight)
    return MatchingClassifier(embedding, distance, features, member | wrong, log_weight)
