"""MAML with implicit gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_int, check_number
from .._keys import keys_as_data, split_or_none
from .._meta_gradient.conjugate_gradients import conjugate_gradients
from .._meta_gradient.inner_loop import Adaptation, InnerLoop
from .._meta_gradient.modes import value_and_grad
from .._model.update_of import update_of
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.outer_step import query_loss, stop_gradient
from .._strategy.rollout_strategy import RolloutStrategy
from .._task.task import Task
from .._types import Loss, Number

# The least curvature of the proximal loss in a direction of conjugate gradients, in units of λ.
_LEAST = 0.1


def _check_strength(strength: Any) -> Number:
    return check_number(strength, "IMAML(strength=...)", positive=True)


def _check_cg_steps(cg_steps: Any) -> int:
    return check_int(
        cg_steps, "IMAML(cg_steps=...)", minimum=1, what="steps of conjugate gradients"
    )


class IMAML(GradientStrategy, RolloutStrategy):
    """MAML with implicit gradients: where adaptation arrives counts, not the way there.

    Rajeswaran, Finn, Kakade, Levine 2019 (arXiv 1909.04630), equations 3 and 6, algorithms 1 and 2:
    `inner` descends `loss(φ; support) + λ/2 ‖φ - θ‖²` from φ = θ, and the outer step is that of the
    minimum, `(I + H/λ)⁻¹ ∇loss(φ; query)`, with the Hessian H of the support loss at φ. The system
    is solved by conjugate gradients. Nothing of the inner loop is kept for it: its memory does not
    grow with `inner.steps`, and `inner.optimizer` may be any.

    What does not adapt (`InnerLoop(adapt=...)`) moves the minimum too, and has that gradient:
    `∇loss(φ; query) - ∇(∇loss(φ; support) · v)/λ`, v being the solution above.

    The gradient is exact in the limit of many inner and `cg_steps`. At a minimum H + λ has no
    negative eigenvalue; where `inner` has not arrived there it may, and the system has no meaning.
    A direction of conjugate gradients in which the proximal loss curves by less than λ/10 ends
    them, with what was found before or, if it is the first one, with ∇loss(φ; query), first order.
    The metrics, means over tasks, say when to mistrust the gradient:

    - `negative_curvature`: the share of tasks of which that is true. Far from 0 the `strength` is
      too low, or `inner` does not arrive.
    - `cg_residual`: `‖g - (I + H/λ) v‖/‖g‖`, near 0 where the system is solved.

    λ should be above minus the smallest eigenvalue of H, and the inner rate below `2/(h + λ)` with
    the largest, h. The gradient does not see the way: unlike MAML's, it does not keep h where the
    inner steps can follow. Of the network of `examples/sinusoid.py` after 500 outer steps, with 10
    inner ones of rate 0.05 and λ = 2, h was 36 to 50 and the smallest -1 to -5: the steps diverged,
    and half of the systems were indefinite. With 40 steps of rate 0.005 it learns: the loss is 0.20
    after 3,000 outer steps, and `negative_curvature` 0.02. (Clipped inner gradients are no way out:
    10 steps of 0.04 did not diverge, and did not arrive; θ left for where the loss is 3,800.)

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`. `inner.gradient` says how
      products with H are computed: `"mixed"` forward over reverse, `"reverse"` reverse over
      reverse, and to `"first_order"` H is zero. `inner.remat` plays no part.
    - `strength`: λ.
    - `cg_steps`: of conjugate gradients, from 0, at most.

    The metric `support_loss/<i>` is without the term in λ. `TrainState.model` is the user's model.

    Raises `TypeError` or `ValueError` for arguments that are not as above.
    """

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    strength: Number = eqx.field(default=2.0, kw_only=True, converter=_check_strength)
    cg_steps: int = eqx.field(default=5, kw_only=True, converter=_check_cg_steps)

    def inner_rollout(self, model: PyTree, support: PyTree, **options) -> Adaptation:
        rule = _proximal(self.inner.optimizer, self.strength)
        return self.inner(self.loss, model, support, optimizer=rule, **options)

    def task_loss(
        self, model: PyTree, task: Task, *, step: Int[Array, ""], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        adapt_key, query_key = split_or_none(key)
        # All is computed here, forwards: what is left to differentiate is linear.
        frozen, support = stop_gradient(model), task.support
        end = self.inner_rollout(frozen, support, key=adapt_key, gradient="first_order")
        next_key = None if key is None else jax.random.fold_in(adapt_key, self.inner.steps)
        key_data, with_key = keys_as_data(next_key)
        like, _ = self.inner.partition(frozen)
        phi, fixed, static = self._split(end.model)

        def adapted(phi: PyTree, fixed: PyTree) -> PyTree:
            return eqx.combine(_complex(phi, like), fixed, static)

        def on_query(phi: PyTree, fixed: PyTree):
            model = adapted(phi, fixed)
            return query_loss(self.loss, self.unadapted(frozen), model, task, query_key)

        def gradient(phi: PyTree, fixed: PyTree) -> PyTree:
            def on_support(phi: PyTree, rest: PyTree) -> Float[Array, ""]:
                fixed, support, data = rest
                return self.loss(adapted(phi, fixed), support, with_key(data))[0]

            rest = fixed, support, key_data
            return value_and_grad(on_support, self.inner.gradient, phi, rest)[1]

        (loss, metrics), (g, direct) = jax.value_and_grad(on_query, (0, 1), has_aux=True)(
            phi, fixed
        )
        _, pull = jax.vjp(gradient, phi, fixed)  # v -> (H v, ∇(∇loss · v)): H is symmetric

        flat, unravel = ravel_pytree(g)

        def system(v: Array) -> Array:
            return v + ravel_pytree(pull(unravel(v))[0])[0] / self.strength

        v, bent = conjugate_gradients(system, flat, self.cg_steps, least=_LEAST)
        v = unravel(v)
        hv, mixed = pull(v)
        residual = jax.tree.map(lambda g, v, hv: g - v - hv / self.strength, g, v, hv)
        size = optax.tree.norm(g)
        residual = optax.tree.norm(residual) / jnp.where(size > 0, size, 1)
        others = jax.tree.map(lambda d, m: d - m / self.strength, direct, mixed)
        objective = _with_gradient(loss, (v, others), self._split(model)[:2])
        solved = {"cg_residual": residual, "negative_curvature": bent.astype(residual.dtype)}
        return objective, {"support_loss": end.losses, **solved, **metrics}

    def _split(self, model: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """What adapts, as real numbers, so that its Hessian is symmetric; what could; the rest."""
        fast, others = self.inner.partition(model)
        return (_real(fast), *eqx.partition(others, eqx.is_inexact_array))


def _proximal(optimizer: optax.GradientTransformation, strength: Number):
    """`optimizer` of `loss(φ) + strength/2 ‖φ - θ‖²`, given the gradient of `loss`. θ, where it
    began, is a part of its state: another call goes on from there."""
    update_inner = update_of(optimizer, "`InnerLoop(optimizer=...)`")

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        return params, optimizer.init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None, **told: Any):
        theta, state = state
        way = jax.tree.map(lambda p, t: p - t, params, theta)
        grads = jax.tree.map(lambda g, w: g + strength * w, updates, way)
        value = told["value"] + strength / 2 * optax.tree.norm(way, squared=True)
        updates, state = update_inner(grads, state, params, value)
        return updates, (theta, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_gradient(value: Array, direction: PyTree, at: PyTree) -> Array:
    """`value`, with `direction` for its gradient in `at`: the rest of both is a constant."""
    value, direction = jax.lax.stop_gradient((value, direction))
    for d, x in zip(jax.tree.leaves(direction), jax.tree.leaves(at), strict=True):
        value += jnp.sum(d * (x - jax.lax.stop_gradient(x))).real.astype(value.dtype)
    return value


def _real(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else x, tree)


def _complex(parts: PyTree, like: PyTree) -> PyTree:
    """The inverse of `_real`, for a tree `like` the one that it was given."""
    return jax.tree.map(lambda x, p: jax.lax.complex(*p) if jnp.iscomplexobj(x) else p, like, parts)
