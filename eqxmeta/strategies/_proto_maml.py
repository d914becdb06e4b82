"""Proto-MAML: MAML of a classifier whose head begins as that of a prototypical network."""

import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._keys import split_or_none
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.features import features
from .._strategy.classes import Classifies, labelled_examples, num_classes, prototypes
from .._strategy.head_predictor import HeadPredictor, LinearHead
from .._strategy.rollout_strategy import RolloutStrategy
from .._types import Loss


class ProtoMAML(Classifies, RolloutStrategy):
    """Proto-MAML: MAML on top of prototypes, for any number of classes.

    Triantafillou et al. 2020 (arXiv 1903.03096), section 3: in each task a linear head begins as
    the equivalent of a prototypical network, `w_k = 2 c_k` and `b_k = -c_k·c_k`, with the mean
    `c_k` of the features of the support examples of class k. Then `inner` adapts head and
    embedding, and the outer step descends the query loss in the embedding alone: through the inner
    steps, and through the prototypes.

    The model that is trained is an embedding, one example to an array, which counts as a vector;
    `inner_adapt` returns a `HeadPredictor`, one example to logits, with the adapted embedding.
    Tasks are classification tasks, `(x, y)` with integer labels `y: [n]` from 0. Nothing that is
    learnt knows the number of classes: it may be another one in testing.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`. `InnerLoop(adapt=...)` is given
      the `HeadPredictor`: `lambda p: p.head` adapts the head alone.
    - `ways`: the number of logits, if all tasks have the same number of classes or a known most.
      `None`: as many as support examples, for in a compiled program labels are not known. A class
      that is not there has a logit of minus infinity, so that loss and accuracy do not depend on
      it.

    Before its prototypes are known nothing predicts: there is no metric `loss_before`. Column 0 of
    an `Evaluation` is the head from the prototypes, before the first inner step.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation

    def inner_rollout(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None, **options
    ) -> Adaptation:
        x, y, weight = labelled_examples(support)
        head_key, key = split_or_none(key)
        found, _ = features(model, x, key=head_key, weight=weight)
        c, present = prototypes(found, y, weight, num_classes(y, self.ways))
        classifier = HeadPredictor(model, LinearHead(2 * c, -jnp.sum(c**2, axis=1)), present)
        return self.inner(self.loss, classifier, support, key=key, **options)
