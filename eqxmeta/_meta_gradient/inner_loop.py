"""The inner loop: gradient descent on the support set of one task."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arguments import (
    check_argument,
    check_choice,
    check_int,
    check_int_or_none,
    check_optimizer,
)
from .._errors import explain
from .._jaxpr.finite_slopes import with_finite_slopes
from .._jaxpr.hoist import hoist
from .._keys import used_again
from .._model.changes import STATE_EXPECTED, changes
from .._model.check import check_stateless
from .._model.holder import HoldsModel
from .._model.state import without_weak_types
from .._model.support_statistics import without_statistics
from .._model.update_of import update_of
from .._task.task import take_examples
from .._types import Loss
from .modes import GRADIENT_MODES, GradientMode, conjugate_complex, value_and_grad
from .scan import scan
from .select import select


class Adaptation(HoldsModel):
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

    - `optimizer`: any of optax and optax.contrib that needs gradients, parameters and the loss at
      most. Not `lbfgs` (a line search), `dpsgd` (the gradient of each example), `sophia` (a
      Hessian) and those whose state keeps what is no array (`dog`, `galore`, the optimistic ones).
      The loss that one looks at, as `polyak_sgd` does, counts as a constant. Where a
      derivative of its arithmetic is infinite or NaN, as that of a root or a norm at zero, it
      counts as zero, so that a gradient of exactly zero does no harm.
    - `gradient` says how the loop is differentiated by the outer loop: `"mixed"` (exact, least
      memory), `"reverse"` (what JAX does by itself; for losses in which a `jax.custom_vjp` or
      `jax.custom_jvp` has a rule that is not the derivative, as of a straight-through estimator;
      `stop_gradient` is no such case) or `"first_order"`. `eqxmeta.check_meta_gradient` compares
      them on your own loss. (Of a single step `"mixed"` would keep as much as `"reverse"` and take
      longer, so that one is differentiated in reverse.)
    - `remat`: for long loops. The outer loop needs the fast weights, and the optimizer's state, of
      every inner step (in reverse mode also the activations). With `remat=True` only those of about
      every `sqrt(steps)`-th step are kept and the others computed again when they are needed:
      memory that grows with the square root of `steps`, for one more evaluation of each inner
      gradient (Chen et al. 2016, arXiv 1604.06174, section 4.1). A number is the length of such a
      block of steps. `trainer.plan` shows what it saves.
    - `window`: truncation. The gradients of all but the last `window` steps of a call count as
      constants, as in `"first_order"`: the meta-gradient is that of these last steps, and passes
      through the others to the initialisation as it is (Shaban et al. 2019, arXiv 1810.10667, with
      the derivative in the initialisation). `None`, or `steps` and more, is exact; 0 is first
      order. Nothing is kept for the backward pass of a step that is constant.

    - `adapt`: what adapts, a function from the model to those of its parts that do:
      `lambda m: m.layers[-1]`, `lambda m: (m.scale, m.shift)`, or all but one part,
      `lambda m: eqx.tree_at(lambda m: m.head, m, None)`. `None`: every inexact array. Leaves
      outside of it cost neither an inner gradient nor memory for fast weights, and what the loss,
      or an evaluation, computes from them alone (the features of a head that adapts by itself) is
      computed once, not at every step; they are meta-learnt like all others, also through the inner
      loop.

    Raises `TypeError` or `ValueError` for an argument that is not as above, and `ValueError` when
    called with a model of which `adapt` chooses no inexact array, or with an optimizer whose steps
    change a leaf of its state that is not an array.
    """

    optimizer: optax.GradientTransformation
    steps: int
    gradient: GradientMode
    remat: bool | int
    adapt: Callable[[Any], PyTree] | None
    window: int | None

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        steps: int,
        gradient: GradientMode = "mixed",
        *,
        adapt: Callable[[Any], PyTree] | None = None,
        remat: bool | int = False,
        window: int | None = None,
    ):
        check_optimizer(optimizer, "InnerLoop(optimizer=...)")
        steps = check_int(steps, "InnerLoop(steps=...)", minimum=1, what="inner steps")
        check_choice(gradient, "InnerLoop(gradient=...)", GRADIENT_MODES)
        if not isinstance(remat, bool):
            what = "inner steps a block, True or False"
            remat = check_int(remat, "InnerLoop(remat=...)", minimum=1, what=what)
        sound = adapt is None or (callable(adapt) and not isinstance(adapt, type))
        expected = "a function from the model to what adapts: `lambda m: m.layers[-1]`; or None"
        fault = "is not a function"
        check_argument(sound, adapt, "InnerLoop(adapt=...)", expected, TypeError, fault)
        self.optimizer = optimizer
        self.steps = steps
        self.gradient = gradient
        self.remat = remat
        self.adapt = adapt
        what = "inner steps that are differentiated"
        self.window = check_int_or_none(window, "InnerLoop(window=...)", minimum=0, what=what)

    def partition(self, model: PyTree) -> tuple[PyTree, PyTree]:
        """`(fast, others)`, which `eqx.combine` puts together: the leaves that adapt, the rest."""
        if self.adapt is None:
            return eqx.partition(model, eqx.is_inexact_array)
        # Where a strategy chooses, the argument is the strategy's.
        argument = getattr(self.adapt, "argument", "InnerLoop(adapt=...)")
        return select(model, self.adapt, argument)

    def init(self, model: PyTree) -> PyTree:
        """State of the inner optimizer before the first step."""
        fast, _ = self.partition(model)
        return without_weak_types(self.optimizer.init(fast))

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
        optimizer: optax.GradientTransformation | None = None,
        gradient: GradientMode | None = None,
        start: int = 0,
    ) -> Adaptation:
        """Adapt `model` to `data`, one set of a `Task`.

        - `key`: for dropout; step `i` uses `fold_in(key, start + i)`. `None`: no randomness.
        - `steps`: overrides `self.steps`; may be 0.
        - `observe`: evaluated along the way, see `Adaptation`.
        - `minibatches`: the examples that each step sees, by index; `None`: all.
        - `opt_state`: continue from this state of the inner optimizer, which also counts the steps
          of its schedules.
        - `start`: the number of the first step. `inner(..., steps=2)`, and then from its `model`
          and `opt_state` `inner(..., steps=2, start=2)` with the same `key`, are four steps: the
          same dropout, and to the bit as far as XLA rounds two programs alike. (Of `minibatches`
          each call takes its own rows.)
        - `optimizer`, `gradient`: in the place of `self.optimizer` and `self.gradient`. An
          optimizer may close over arrays, which are differentiated: a learnt rule.
        """
        steps = self.steps if steps is None else steps
        optimizer = self.optimizer if optimizer is None else optimizer
        mode = self.gradient if gradient is None else gradient
        exact = steps
        if self.window is not None and mode != "first_order":
            exact = min(steps, self.window)
        mode = "reverse" if mode == "mixed" and exact == 1 else mode
        check_stateless(model, "inner_adapt(model, ...)")
        # Those of a model that has adapted to other examples.
        model = without_statistics(model)
        fast, others = self.partition(model)
        opt_state = without_weak_types(optimizer.init(fast)) if opt_state is None else opt_state
        arrays, static = eqx.partition(opt_state, eqx.is_array)
        update = with_finite_slopes(_update_arrays(optimizer, static))
        dtypes = jax.tree.map(lambda x: x.dtype, (fast, arrays))
        index = start + jnp.arange(steps)
        # Before the loop, for `jax_debug_key_reuse` lets no loop use a key that is from outside.
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        xs = (index, minibatches, keys)

        def support_loss(varying: PyTree, fixed: PyTree) -> Float[Array, ""]:
            (fast, (_, rows, step_key)), (others, data) = varying, fixed
            batch = data if rows is None else take_examples(data, rows)
            return loss(eqx.combine(fast, others), batch, step_key)[0]

        def observed_of(fast: PyTree, others: PyTree) -> PyTree:
            return None if observe is None else observe(eqx.combine(fast, others))

        inner_loss, fixed = support_loss, (others, data)
        view, viewed = observed_of, others
        if self.adapt is not None and steps > 0:
            first = jax.tree.map(lambda x: x[0], used_again(xs))
            inner_loss, fixed = hoist(support_loss, (fast, first), fixed)
            view, viewed = hoist(observed_of, fast, others)

        def step(mode: GradientMode, carry: tuple[PyTree, PyTree], x: PyTree):
            fast, arrays = carry
            before = view(fast, viewed)
            value, grads = value_and_grad(
                lambda fast, rest: inner_loss((fast, rest[0]), rest[1]), mode, fast, (x, fixed)
            )
            updates, arrays = update(conjugate_complex(grads), arrays, fast, value)
            new = (optax.apply_updates(fast, updates), arrays)
            # Optimizers may compute in a wider type (a schedule's float32 rate on bfloat16
            # parameters); the model's dtypes are the user's and stay.
            return jax.tree.map(lambda x, dtype: x.astype(dtype), new, dtypes), (value, before)

        early = steps - exact
        parts: list[tuple[int, int, GradientMode]] = [(0, early, "first_order")] if early else []
        if exact or not early:
            parts.append((early, steps, mode))
        carry, done = (fast, arrays), []
        for i, j, mode in parts:
            part = jax.tree.map(lambda x, i=i, j=j: x[i:j], used_again(xs))
            carry, ys = scan(partial(step, mode), carry, part, j - i, self.remat)
            done.append(ys)
        fast, arrays = carry
        losses, path = jax.tree.map(lambda *ys: jnp.concatenate(ys), *done)
        end = view(fast, viewed)
        observed = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), path, end)
        return Adaptation(eqx.combine(fast, others), losses, observed, eqx.combine(arrays, static))


def _update_arrays(optimizer: optax.GradientTransformation, static: PyTree) -> Callable[..., Any]:
    """`optimizer.update` of the arrays in its state; the other leaves, `static`, are the same
    at every step of a compiled loop. Raises `ValueError`, naming it, for one that is not.
    """
    name = "`InnerLoop(optimizer=...)`"
    update = update_of(optimizer, name)

    def of_arrays(grads: PyTree, arrays: PyTree, params: PyTree, value: Array):
        old = eqx.combine(arrays, static)
        updates, new = update(grads, old, params, value)
        if changed := changes(old, new, cast=True):
            message = f"A step of {name} changed a shape or a constant leaf in its state."
            raise ValueError(explain(message, "; ".join(changed), STATE_EXPECTED))
        return updates, eqx.filter(new, eqx.is_array)

    return of_arrays
