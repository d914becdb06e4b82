"""Relation networks."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._keys import split_or_none
from .._model.features import called, features
from .._model.predict import predict
from .._model.state import MetaParameters, meta_parameters
from .._strategy.classes import ByFeatures, LabelledExamples, prototypes


class RelationClassifier(eqx.Module):
    """Maps one example to logits `[classes]`, how much it is related to each class:
    `g([c_k, f(x)])`.

    - `embedding`: f, the user's own model. `relation`: g.
    - `prototypes`: c, `[classes, ...]`, the mean of each class of the support set.
    - `present`: `[classes]`, whether the class was in the support set; the logit of one that was
      not is minus infinity.
    """

    embedding: PyTree
    relation: Callable
    prototypes: Float[Array, "classes ..."]
    present: Bool[Array, " classes"]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> Float[Array, " classes"]:
        embed_key, key = split_or_none(key)
        feature = called(self.embedding, x, embed_key)

        def related(prototype: Array) -> Float[Array, ""]:
            out = called(self.relation, jnp.concatenate([prototype, feature]), key)
            return jnp.reshape(out, ())

        return jnp.where(self.present, jax.vmap(related)(self.prototypes), -jnp.inf)


class RelationNet(ByFeatures):
    """Relation networks: an embedding, and a network that says how much two features are related.

    Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018 (arXiv 1711.06025), equation 1: the relation of
    a query x to class k is `sigmoid(g([c_k, f(x)]))`, where c_k is made of the features of the
    class's support examples, and [ , ] puts one after the other (of feature maps `[channels, h, w]`
    the channels). There is no inner gradient; the outer step descends `loss` on the query set in
    the parameters of f and g.

        g = eqx.nn.MLP(2 * 64, "scalar", 64, 1, key=key)  # f has 64 features
        em.RelationNet(em.losses.cross_entropy, adam, relation=g)

    The model that is trained is f: one example to an array. `inner_adapt` returns a
    `RelationClassifier`, one example to logits `g([c_k, f(x)])`, before the sigmoid. Tasks are as
    for `ProtoNet`. c_k is the mean over the class; the paper has the sum, which is the same with
    one shot, and with more depends on their number.

    - `loss`: of logits. The paper's, squared errors of the relations (equation 2), is
      `eqxmeta.losses.sigmoid_mse`; with `eqxmeta.losses.cross_entropy` classes compete.
    - `relation`: g at the start of training, a model that takes `[2 d, ...]` for features
      `[d, ...]` and returns one number. Layers that normalise by the support set have the
      statistics of all pairs of a support example and a class.
    - `optimizer`, `task_chunk`, `learn`, `ways`: as for `ProtoNet`. All of g is learnt.

    Before adaptation there is no classifier: no metric `loss_before`, and in an `Evaluation` the
    column of step 0 is NaN; that of step 1 is what counts. `TrainState.model` is a `MetaParameters`
    of `model`, f, and `extra`, g.

    Raises `TypeError` or `ValueError` for arguments, or tasks, that are not as above. A support
    label outside `range(ways)` makes every logit NaN.
    """

    relation: Callable = eqx.field(kw_only=True)

    def __check_init__(self):
        relation, argument = self.relation, "RelationNet(relation=...)"
        sound = callable(relation) and not isinstance(relation, type)
        expected = "a model of two features, one after the other, such as an `eqx.nn.MLP`"
        check_argument(sound, relation, argument, expected, TypeError)

    def meta_model(self, model: PyTree) -> MetaParameters:
        return MetaParameters(model, self.relation)

    def classifier(
        self, model: PyTree, support: LabelledExamples, classes: int, key: PRNGKeyArray | None
    ) -> RelationClassifier:
        x, y, weight = support
        learnt = meta_parameters(model, "RelationNet")
        embed_key, key = split_or_none(key)
        found, embedding = features(learnt.model, x, key=embed_key, weight=weight)
        means, present = prototypes(found, y, weight, classes)
        shape = eqx.filter_eval_shape(predict, learnt.model, x, embed_key).shape[1:]
        means, found = (array.reshape(-1, *shape) for array in (means, found))
        # For what normalises by the support set; without it nothing of this is computed.
        pairs = jax.vmap(lambda f: jax.vmap(lambda c: jnp.concatenate([c, f]))(means))(found)
        exists = jnp.ones(y.shape) if weight is None else weight
        exists = (exists[:, None] * present[None, :]).ravel()
        pairs = pairs.reshape(-1, *pairs.shape[2:])
        _, relation = features(learnt.extra, pairs, key=key, weight=exists)
        return RelationClassifier(embedding, relation, means, present)
