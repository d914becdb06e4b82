import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._arguments import check_int, check_optimizer
from ._errors import explain
from ._meta_gradient import GRADIENT_MODES, GradientMode, value_and_grad
from ._safe_sqrt import with_safe_sqrt
from ._state import strong
from ._types import Loss


class Adaptation(eqx.Module):
    """What an inner loop of K steps did.

    - `model`: after K steps.
    - `losses`: the loss that each step descended, before the step, `[K]`. Not differentiable.
    - `observed`: `observe(model)` before the first and after every step, stacked `[K + 1, ...]`.
    - `opt_state`: state of the inner optimizer after K steps.
    """

    model: PyTree
    losses: Float[Array, " steps"]
    observed: PyTree
    opt_state: PyTree


class InnerLoop(eqx.Module):
    """Gradient descent on one task: `steps` steps of an optax `optimizer`.

    - `gradient` says how the loop is differentiated by the outer loop: `"mixed"` (exact, least
      memory), `"reverse"` (exact, for losses whose gradient is not a true gradient, such as
      straight-through estimators) or `"first_order"`. `eqxmeta.check_meta_gradient` compares them
      on your own loss. (Of a single step `"mixed"` would keep as much as `"reverse"` and take
      longer, so that one is differentiated in reverse.)
    - `remat`: for long loops. The outer loop needs the fast weights, and the optimizer's state, of
      every inner step (in reverse mode also the activations). With `remat=True` only those of about
      every `sqrt(steps)`-th step are kept and the others computed again when they are needed:
      memory that grows with the square root of `steps`, for one more evaluation of each inner
      gradient (Chen et al. 2016, arXiv 1604.06174, section 4.1). A number is the length of such a
      block of steps. `trainer.plan` shows what it saves.

    What adapts is every inexact array of the model. To hold leaves fixed give them
    `optax.set_to_zero()` in an `optax.partition`, or use `jax.lax.stop_gradient` on them inside
    the model.

    Raises `TypeError` or `ValueError` for an argument that is not as above.
    """

    optimizer: optax.GradientTransformation
    steps: int
    gradient: GradientMode
    remat: bool | int

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        steps: int,
        gradient: GradientMode = "mixed",
        *,
        remat: bool | int = False,
    ):
        check_optimizer(optimizer, "InnerLoop(optimizer=...)")
        steps = check_int(steps, "InnerLoop(steps=...)", minimum=1, what="inner steps")
        if gradient not in GRADIENT_MODES:
            expected = ", ".join(map(repr, GRADIENT_MODES))
            raise ValueError(
                explain(
                    "`InnerLoop(gradient=...)` is invalid.", repr(gradient), f"one of {expected}"
                )
            )
        if not isinstance(remat, bool):
            what = "inner steps a block, True or False"
            remat = check_int(remat, "InnerLoop(remat=...)", minimum=1, what=what)
        self.optimizer = optimizer
        self.steps = steps
        self.gradient = gradient
        self.remat = remat

    def init(self, model: PyTree) -> PyTree:
        """State of the inner optimizer before the first step."""
        return strong(self.optimizer.init(eqx.filter(model, eqx.is_inexact_array)))

    def __call__(
        self,
        loss: Loss,
        model: PyTree,
        data: PyTree,
        *,
        key: PRNGKeyArray | None = None,
        steps: int | None = None,
        observe: Callable[[PyTree], PyTree] | None = None,
        minibatches: Int[Array, "steps size"] | None = None,
        opt_state: PyTree | None = None,
    ) -> Adaptation:
        """Adapt `model` to `data`, whose leaves lead with the example axis.

        - `key`: for dropout; step `i` uses `fold_in(key, i)`. `None`: no randomness.
        - `steps`: overrides `self.steps`; may be 0.
        - `observe`: evaluated along the way, see `Adaptation`.
        - `minibatches`: the examples that each step sees, by index; `None`: all.
        - `opt_state`: continue from this state of the inner optimizer.
        """
        steps = self.steps if steps is None else steps
        mode = "reverse" if self.gradient == "mixed" and steps == 1 else self.gradient
        fast, frozen = eqx.partition(model, eqx.is_inexact_array)
        opt_state = self.init(model) if opt_state is None else opt_state
        update = with_safe_sqrt(self.optimizer.update)
        dtypes = jax.tree.map(lambda x: x.dtype, (fast, opt_state))

        def inner_loss(fast: PyTree, rest: tuple[PyTree, PyTree, Any]) -> Float[Array, ""]:
            frozen, batch, step_key = rest
            return loss(eqx.combine(fast, frozen), batch, step_key)[0]

        def seen(fast: PyTree) -> PyTree:
            return None if observe is None else observe(eqx.combine(fast, frozen))

        def step(carry: tuple[PyTree, PyTree], x: tuple[Array, Any]):
            fast, opt_state = carry
            index, rows = x
            step_key = None if key is None else jax.random.fold_in(key, index)
            batch = data if rows is None else jax.tree.map(lambda leaf: leaf[rows], data)
            before = seen(fast)
            value, grads = value_and_grad(inner_loss, mode, fast, (frozen, batch, step_key))
            updates, opt_state = update(grads, opt_state, fast)
            new = (optax.apply_updates(fast, updates), opt_state)
            # Optimizers may compute in a wider type (a schedule's float32 rate on bfloat16
            # parameters); the model's dtypes are the user's and stay.
            return jax.tree.map(lambda x, dtype: x.astype(dtype), new, dtypes), (value, before)

        xs = (jnp.arange(steps), minibatches)
        (fast, opt_state), (losses, path) = _scan(step, (fast, opt_state), xs, steps, self.remat)
        observed = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), path, seen(fast))
        return Adaptation(eqx.combine(fast, frozen), losses, observed, opt_state)


def _scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    steps: int,
    remat: bool | int,
) -> tuple[PyTree, PyTree]:
    """`lax.scan(step, carry, xs)` of `steps` steps, with the first one outside of the loop.

    Before it all tasks have the same weights, which under `vmap` therefore have no task axis: the
    forward pass is one product of the shared weights with the examples of all tasks. A loop's
    carry would have that axis from the start.
    """
    if steps == 0:
        return jax.lax.scan(step, carry, xs, length=0)
    carry, first = step(carry, jax.tree.map(lambda x: x[0], xs))
    parts = [jax.tree.map(lambda y: y[None], first)]
    rest = steps - 1
    length = rest if remat is False else math.isqrt(rest) if remat is True else min(remat, rest)
    whole = rest // length * length if length else 0

    def block(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(step, carry, xs)

    if length < whole:
        blocks = jax.tree.map(lambda x: x[1 : 1 + whole].reshape(-1, length, *x.shape[1:]), xs)
        # Inside of a loop there is nothing that XLA could merge the second evaluation with.
        remembered = jax.checkpoint(block, prevent_cse=False)  # pyright: ignore
        carry, ys = jax.lax.scan(remembered, carry, blocks)
        parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
        rest -= whole
    if rest:
        carry, ys = block(carry, jax.tree.map(lambda x: x[steps - rest :], xs))
        parts.append(ys)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
