"""Prototypical networks."""

from jaxtyping import PRNGKeyArray, PyTree

from .._model.features import features
from .._strategy.by_distance import ByDistance, PrototypeClassifier
from .._strategy.classes import LabelledExamples, prototypes


class ProtoNet(ByDistance):
    """Prototypical networks: an embedding in which a class is where the mean of its examples is.

    Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equations 1 and 2: `c_k` is the mean of `f(x)`
    over the support examples of class k, and `p(y = k | x) ∝ exp(-‖f(x) - c_k‖²)`. There is no
    inner gradient; the outer step descends `loss` on the query set in the parameters of f.

    The model that is trained is f: one example to an array, which counts as a vector.
    `inner_adapt` returns a `PrototypeClassifier`, one example to logits. Tasks are classification
    tasks, `(x, y)` with integer labels `y: [n]` from 0; more ways may be used for training than for
    testing, as in the paper, and classes need not be of one size or in order.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `optimizer`: the outer optax optimizer. `task_chunk`: see `GradientStrategy`; `learn`:
      see `Strategy`.
    - `distance`: what the logits are minus of. `"euclidean"` is the paper's, squared; `"cosine"` is
      `-s cos(f(x), c_k)` with a learnt scale s, at first 10 (without one the probabilities could
      not come near 0 or 1). Or a function of two vectors `[d]`, f(x) and c_k; of an `eqx.Module`
      every inexact array is learnt too.
    - `ways`: the number of logits, if all tasks have the same number of classes or a known most.
      `None`: what the labels say, where they are at hand (a call of `inner_adapt` by itself). In a
      compiled program, such as training, they are not, but no class has less than one example:
      there are as many logits as support examples. A class that is not there has a logit of minus
      infinity, a probability of zero, so that loss and accuracy do not depend on it.

    Before adaptation there is no classifier: no metric `loss_before`, and in an `Evaluation` the
    column of step 0 is NaN; that of step 1 is what counts. `TrainState.model` is f or, where the
    distance is learnt, a `MetaParameters` of `model`, f, and `extra`, the distance.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> PrototypeClassifier:
        x, y, weight = support
        embedding, distance = self.embedding_and_distance(model)
        found, embedding = features(embedding, x, key=key, weight=weight)
        return PrototypeClassifier(embedding, distance, *prototypes(found, y, weight, classes))
