"""Baseline and Baseline++: class-wide pretraining, then a new head on frozen features."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_int_or_none, check_number
from .._keys import split_or_none
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.features import features
from .._model.state import own_model
from .._strategy.classes import labelled_examples, memberships, num_classes
from .._strategy.head import adapting
from .._strategy.head_predictor import HeadPredictor, LinearHead
from .._strategy.pretraining import Pretraining, unit, zero_head
from .._strategy.rollout_strategy import RolloutStrategy, first_order, on_minibatches
from .._types import Loss, Number


def _head_of(predictor: Any) -> PyTree:
    return predictor.head if isinstance(predictor, HeadPredictor) else ()


class _NewHead(Pretraining, RolloutStrategy):
    """Adapts by `inner` a new head on the features of the support set, which are computed once."""

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    batch_size: int | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        self.inner = adapting(first_order(self.inner), _head_of, f"{name}(...)")
        argument = f"{name}(batch_size=...)"
        self.batch_size = check_int_or_none(self.batch_size, argument, minimum=1, what="examples")

    def inner_rollout(
        self,
        model: PyTree,
        support: PyTree,
        *,
        key: PRNGKeyArray | None = None,
        observe: Callable[[PyTree], PyTree] | None = None,
        **options,
    ) -> Adaptation:
        x, y, weight = labelled_examples(support)
        feature_key, key = split_or_none(key)
        found, body = features(own_model(model), x, key=feature_key, weight=weight)
        ways = num_classes(y, self.ways)
        _, _, present = memberships(y, weight, ways, found.dtype)
        head = HeadPredictor(eqx.nn.Identity(), self.new_head(ways, found.shape[1]), present)
        data = (found, y) if weight is None else (found, y, weight)

        def with_body(predictor: HeadPredictor) -> HeadPredictor:
            return dataclasses.replace(predictor, embedding=body)

        if observe is not None:
            options["observe"] = lambda predictor: observe(with_body(predictor))
        end = on_minibatches(self.inner, self.loss, head, data, self.batch_size, key=key, **options)
        return dataclasses.replace(end, model=with_body(end.model))


class Baseline(_NewHead):
    """Pretraining on all classes, then a new linear head on features that stay.

    Chen, Liu, Kira, Wang, Huang 2019 (arXiv 1904.04232), section 3.2: the body and a linear head of
    `classes` logits are trained on ordinary minibatches, those of `eqxmeta.tasks.Minibatches`. In a
    task the body stays, and `inner` trains a linear head of its own, from zero, on the features of
    the support set.

    The model that is trained is the body, an embedding: one example to an array, which counts as a
    vector. `TrainState.model` is `MetaParameters(body, head)` with the head of the training
    classes; `inner_adapt` returns a `HeadPredictor`, one example to logits. A body that was
    trained elsewhere is evaluated as it is: `em.evaluate(strategy, body, episodes)`; with features
    for images it is `eqx.nn.Identity()`.

    - `loss`: of logits, such as `eqxmeta.losses.cross_entropy`.
    - `inner`: how a new head is trained. The paper: `InnerLoop(optax.chain(
      optax.add_decayed_weights(0.001), optax.sgd(0.01, momentum=0.9)), steps=100)`; `gradient`
      plays no part.
    - `batch_size`: support examples per inner step, as for `Reptile`; in the paper 4. `None`: all.
    - `optimizer`, `task_chunk`, `learn`: as for `MAML`. The outer step sees `meta_batch_size`
      minibatches.
    - `classes`: the number of training classes, `Minibatches(...).num_classes`; `features`: of the
      body. Both may be left out where nothing is trained.
    - `ways`: the number of logits in a task, if all have the same number of classes or a known
      most. `None`: as many as support examples, for in a compiled program labels are not known. A
      class that is not there has a logit of minus infinity.

    Metrics in training are those of the minibatch: `loss`, `accuracy`, `grad_norm`. Few-shot tasks
    are for `Evaluate`, of held-out classes; column 0 of an `Evaluation` is the head at zero.

    Raises `TypeError` or `ValueError` for arguments that are not as above, for tasks with a support
    set in training, and when trained without `classes` and `features`. A support label outside
    `range(ways)` makes every logit NaN.
    """

    def new_head(self, classes: int, features: int) -> LinearHead:
        return zero_head(classes, features)


class CosineHead(eqx.Module):
    """`scale * cos(w_k, f)`, of features f."""

    weight: Float[Array, "classes features"]
    scale: Number = eqx.field(static=True)

    def __call__(self, features: Float[Array, " features"]) -> Float[Array, " classes"]:
        return self.scale * (unit(self.weight) @ unit(features))


def _check_scale(scale: Any) -> Number:
    return check_number(scale, "BaselinePlusPlus(scale=...)", positive=True)


class BaselinePlusPlus(_NewHead):
    """`Baseline` with cosines in the place of products, which makes features of one class alike.

    Chen, Liu, Kira, Wang, Huang 2019 (arXiv 1904.04232), section 3.2: in training and in a task the
    logit of class k is `scale * cos(w_k, f(x))`. The weights begin at random, in every task at the
    same ones.

    - `scale`: by which cosines are multiplied. The paper's code has 2 for up to 200 classes, 10 for
      more.
    - All else: as for `Baseline`.
    """

    scale: Number = eqx.field(default=10.0, kw_only=True, converter=_check_scale)

    def new_head(self, classes: int, features: int) -> CosineHead:
        bound = features**-0.5
        weight = jax.random.uniform(
            jax.random.key(0), (classes, features), minval=-bound, maxval=bound
        )
        return CosineHead(weight, self.scale)
