"""Conditional neural processes."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_argument, check_number
from .._errors import explain
from .._keys import split_or_none
from .._model.features import embedded
from .._model.features import features as features_of
from .._model.state import MetaParameters, meta_parameters
from .._strategy.gradient_strategy import GradientStrategy
from .._task.examples import examples
from .._types import Loss


class ConditionalProcess(eqx.Module):
    """Maps one example x to `(mean, scale)`, of the normal distribution of its target, each of the
    target's shape.

    - `decoder`: g, of `[r, x]`.
    - `representation`: r, `[features]`, of the support set.
    - `shape`: that of a target. `min_scale`: see `CNP`.
    """

    decoder: Callable
    representation: Float[Array, " features"]
    shape: tuple[int, ...] = eqx.field(static=True)
    min_scale: float = eqx.field(static=True)

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> tuple[Array, Array]:
        out = embedded(self.decoder, _joined(self.representation, x), key)
        if out.size != 2 * math.prod(self.shape):
            message = "`CNP(decoder=...)` returns another number of outputs."
            expected = f"two for each number of a target of shape {self.shape}: mean and scale"
            raise ValueError(explain(message, f"{out.size} outputs", expected))
        mean, raw = out.reshape(2, *self.shape)
        return mean, self.min_scale + (1 - self.min_scale) * jax.nn.softplus(raw)


class CNP(GradientStrategy):
    """Conditional neural processes: a support set is encoded as one vector, from which, together
    with its input, the distribution of every target is decoded.

    Garnelo et al. 2018 (arXiv 1807.01613), equations 1 to 3: `r_i = h(x_i, y_i)` for each support
    example, `r`, their mean, and `(mean, scale) = g(r, x)` for a query x: a normal distribution.
    There is no inner gradient; the outer step descends `loss` on the query set in the parameters of
    h and g. The order of the support examples does not matter, and their number is free.

        h = eqx.nn.MLP(1 + 1, 128, 128, 2, key=h_key)  # x: [1] and y: [1]
        g = eqx.nn.MLP(128 + 1, 2, 128, 2, key=g_key)
        strategy = em.CNP(em.losses.gaussian_nll, optax.adam(1e-3), decoder=g)
        state = em.Trainer(strategy, meta_batch_size=25).fit(h, tasks, steps=20_000)

    The model that is trained is h, from the vector `[x, y]` of one example to a vector.
    `inner_adapt` returns a `ConditionalProcess`, one example to `(mean, scale)`. Tasks are
    regression tasks, `(x, y)`.

    - `loss`: of `(mean, scale)`: `eqxmeta.losses.gaussian_nll`, which reports `mse` too.
    - `decoder`: g at the start of training, a model that takes the vector `[r, x]` and returns a
      mean for each number of a target, then as many for scales. All of it is learnt.
    - `min_scale`: the scale is `min_scale + (1 - min_scale) softplus(g)`, as in the code of the
      authors, with their 0.1. Where targets are known better than that, less fits better.
    - `optimizer`, `task_chunk`, `learn`: as for `ProtoNet`.

    Before it has seen a support set nothing predicts: no metric `loss_before`, and in an
    `Evaluation` the column of step 0 is NaN; that of step 1 is what counts. `TrainState.model` is a
    `MetaParameters` of `model`, h, and `extra`, g.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    decoder: Callable = eqx.field(kw_only=True)
    min_scale: float = eqx.field(default=0.1, kw_only=True)

    def __check_init__(self):
        decoder, argument = self.decoder, "CNP(decoder=...)"
        sound = callable(decoder) and not isinstance(decoder, type)
        expected = "a model of `[r, x]`, such as an `eqx.nn.MLP`"
        check_argument(sound, decoder, argument, expected, TypeError)
        scale = check_number(self.min_scale, "CNP(min_scale=...)")
        check_argument(0 <= scale < 1, scale, "CNP(min_scale=...)", "a number in [0, 1)")

    def meta_model(self, model: PyTree) -> MetaParameters:
        return MetaParameters(model, self.decoder)

    def unadapted(self, model: PyTree) -> None:
        return None

    @eqx.filter_jit
    def inner_adapt(
        self, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
    ) -> ConditionalProcess:
        learnt = meta_parameters(model, "CNP")
        encode_key, key = split_or_none(key)
        _, _, weight = examples(support)
        # As parts of `x` the targets of padding are of no account either.
        (x, y), _, _ = examples((tuple(support[:2]), *support[1:]))
        pairs = jax.vmap(_joined)(x, y)
        found, _ = features_of(learnt.model, pairs, key=encode_key, weight=weight)
        r = jnp.average(found, axis=0, weights=weight)
        # For what normalises by the support set; without it nothing of this is computed.
        queries = jax.vmap(lambda x: _joined(r, x))(x)
        _, decoder = features_of(learnt.extra, queries, key=key, weight=weight)
        return ConditionalProcess(decoder, r, y.shape[1:], self.min_scale)


def _joined(*parts: PyTree) -> Float[Array, " size"]:
    return ravel_pytree(parts)[0]
