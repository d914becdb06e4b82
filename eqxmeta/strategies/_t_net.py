"""T-Net: MAML with linear transformations between the layers that do not adapt."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._errors import explain
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._model.state import MetaParameters, meta_parameters
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.rollout_strategy import RolloutStrategy
from .._types import Loss
from ..nn import Conv2d


class TNet(GradientStrategy, RolloutStrategy):
    """T-Net: MAML in a network with a learnt linear map after each layer, fixed while it adapts.

    Lee, Choi 2018 (arXiv 1801.05558), section 3.1: a layer `W x + b` becomes `T (W x + b)`, with T
    `[out, out]`, of a convolution over its channels. Inner steps change W and b, the outer step,
    with one optimizer, these and T. So T says in which metric a layer's output learns: a gradient
    step on W moves `T W` along `T Tᵀ` times its own gradient. (MT-nets, which also sample which
    parts of W adapt, are not built. Nor is WarpGrad, Flennerhag et al. 2020, arXiv 1909.00025: such
    layers learn there from an objective of their own, along the path and not through it.)

    The T are identities at first, so that training begins as MAML with the same `inner`. They are
    multiplied into the layers: what `inner_adapt` returns, and what predicts before adapting,
    `unadapted(state.model)`, is a model of the user's own type, with `T W` and `T b`.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, a list of T,
    one for each `eqx.nn.Linear`, `eqx.nn.Conv` and `eqxmeta.nn.Conv2d`, in the model's order. (None
    for a convolution in groups.)

    `loss`, `inner`, `optimizer`, `task_chunk`, `learn`, `estimator`: as for `MAML`; `learn` and
    `InnerLoop(adapt=)` are of the user's model, and every T is learnt.

    Raises `ValueError` for a model without such layers.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation

    def meta_model(self, model: PyTree) -> MetaParameters:
        layers = [x for x in jax.tree.leaves(model, is_leaf=_is_layer) if _is_layer(x)]
        if not layers:
            expected = "a model with `eqx.nn.Linear`, `eqx.nn.Conv` or `eqxmeta.nn.Conv2d`"
            message = "`TNet` transforms the outputs of layers, of which the model has none."
            raise ValueError(explain(message, type(model).__name__, expected))
        eyes = [jnp.eye(x.weight.shape[0], dtype=x.weight.dtype) for x in layers]
        return MetaParameters(model, eyes)

    def unadapted(self, model: PyTree) -> PyTree:
        learnt = meta_parameters(model, "TNet")
        return _transformed(learnt.model, learnt.extra)

    def inner_rollout(
        self,
        model: PyTree,
        support: PyTree,
        *,
        observe: Callable[[PyTree], PyTree] | None = None,
        **options,
    ) -> Adaptation:
        learnt = meta_parameters(model, "TNet")

        def predictor(model: PyTree) -> PyTree:
            return _transformed(model, learnt.extra)

        def loss(model: PyTree, batch: PyTree, key: Any):
            return self.loss(predictor(model), batch, key)

        seen = None if observe is None else lambda model: observe(predictor(model))
        end = self.inner(loss, learnt.model, support, observe=seen, **options)
        return Adaptation(predictor(end.model), end.losses, end.observed, end.opt_state)


def _is_layer(x: Any) -> bool:
    # Of a grouped convolution `T W` would be another map: its rows see different channels.
    layers = eqx.nn.Linear | eqx.nn.Conv | Conv2d
    return isinstance(x, layers) and getattr(x, "groups", 1) == 1


def _transformed(model: PyTree, matrices: list[Array]) -> PyTree:
    left = iter(matrices)

    def one(layer: Any) -> Any:
        if not _is_layer(layer):
            return layer
        matrix = next(left)
        # At full precision, or an identity would round on some devices.
        arrays = jax.tree.map(
            lambda x: jnp.tensordot(matrix, x, 1, precision="highest"),
            (layer.weight, layer.bias),
        )
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, arrays, is_leaf=lambda x: x is None)

    return jax.tree.map(one, model, is_leaf=_is_layer)
