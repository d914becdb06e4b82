"""Matching networks."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._model.features import embedded, features
from .._strategy.by_distance import ByDistance, Distance
from .._strategy.classes import LabelledExamples, memberships


class MatchingClassifier(eqx.Module):
    """Maps one example to logits `[classes]`, up to a constant the logarithms of the attention that
    the examples of each class get: `log Σ_i w_i exp(-d(f(x), f(x_i)))` over those of class k.

    - `embedding`: f, the user's own model. `distance`: d.
    - `features`: `[n, features]`, f(x_i) of the support set.
    - `share`: `[n, classes]`, w_i for the class of example i, 0 for others.
    - `present`: `[classes]`, whether the class was in the support set; the logit of one that was
      not is minus infinity.
    """

    embedding: PyTree
    distance: Distance
    features: Float[Array, "n features"]
    share: Float[Array, "n classes"]
    present: Bool[Array, " classes"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " classes"]:
        feature = embedded(self.embedding, x, key)
        distances = jax.vmap(lambda other: self.distance(feature, other))(self.features)
        # Of a class without examples the sum is that of all, for the logarithm of nothing has no
        # derivative.
        share = jnp.where(self.present, self.share, 1)
        logits = jax.nn.logsumexp(-distances[:, None], axis=0, b=share)
        return jnp.where(self.present, logits, -jnp.inf)


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

    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> MatchingClassifier:
        x, y, weight = support
        embedding, distance = self.embedding_and_distance(model)
        found, embedding = features(embedding, x, key=key, weight=weight)
        member, weight, present = memberships(y, weight, classes, found.dtype)
        share = weight[:, None] * member
        return MatchingClassifier(embedding, distance, found, share, present)
