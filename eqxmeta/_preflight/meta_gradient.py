"""A check of the meta-gradient against finite differences."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._errors import annotate_errors, succeeds
from .._keys import used_again
from .._meta_gradient.modes import refuses_mixed
from .._model.check import check_model
from .._model.support_statistics import with_support_statistics
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy, partition_learnt
from .._task.task import Task, shapes_of

# Central differences in float64: the truncation error is of order eps**2, rounding of order
# 1e-16 / eps, and both are far below the tolerance.
_EPS = 1e-5
_DIRECTIONS = 3
# An outer step by which whatever changes in the course of training has come to its end.
_LATE = 1_000_000_000
# Relative; a kink near the parameters makes less of a difference, noise in float64 far less.
_FAR_OFF = 1e-2
_OWN_STEP = (
    "\n(for MAML's objective: the outer step of `{}` is its own, and `gradient` plays no part in "
    "it unless it differentiates `inner_adapt`)"
)


@dataclass(frozen=True)
class MetaGradientCheck:
    """Relative errors between three ways to the same meta-gradient, in float64.

    - `mixed_vs_reverse`: `"mixed"` against `"reverse"`, over the whole gradient; infinite if one
      of them is not finite, or the loss cannot be differentiated in mixed mode at all.
    - `mixed_vs_finite_differences`, `reverse_vs_finite_differences`: the largest over some random
      directions. These also fail where the loss hides a dependence (`stop_gradient`) on purpose,
      or has a kink at the very parameters.
    - `not_finite`: what has NaN or infinities: `"mixed"`, `"reverse"`, `"finite differences"`.
    """

    mixed_vs_reverse: float
    mixed_vs_finite_differences: float
    reverse_vs_finite_differences: float
    tolerance: float
    caution: str = ""
    not_finite: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether `"mixed"` may be used: it agrees with `"reverse"`."""
        return self.mixed_vs_reverse <= self.tolerance

    def __str__(self) -> str:
        modes = [mode for mode in ("mixed", "reverse") if mode in self.not_finite]
        if self.not_finite:
            verdict = f"Not finite: {' and '.join(self.not_finite)}"
            if len(modes) == 2 and "finite differences" not in self.not_finite:
                verdict += (
                    "\nFinite differences are finite here, but JAX's derivative is not: look at "
                    "the inner loss, the inner optimizer and the query loss"
                )
            elif modes == ["mixed"]:
                verdict += ": use gradient='reverse'"
        elif self.ok:
            verdict = "use gradient='mixed'"
        elif np.isinf(self.mixed_vs_reverse):
            verdict = "use gradient='reverse': mixed mode cannot differentiate this inner loss"
        else:
            verdict = (
                "use gradient='reverse': the modes differ, as they do where a derivative rule in "
                "the inner loss is not the derivative"
            )
        far = min(self.mixed_vs_finite_differences, self.reverse_vs_finite_differences) > _FAR_OFF
        if far and not self.not_finite:
            verdict += (
                "\nNeither mode is the derivative of what is evaluated: something in it is hidden "
                "(`stop_gradient`), has a derivative rule of its own, or jumps"
            )
        return (
            f"mixed vs reverse               {self.mixed_vs_reverse:.1e}\n"
            f"mixed vs finite differences    {self.mixed_vs_finite_differences:.1e}\n"
            f"reverse vs finite differences  {self.reverse_vs_finite_differences:.1e}\n"
            f"{verdict}{self.caution}"
        )


def check_meta_gradient(
    strategy: Strategy,
    model: PyTree,
    task: Task,
    *,
    key: PRNGKeyArray | None = None,
    tolerance: float = 1e-4,
) -> MetaGradientCheck:
    """Compare the modes of the meta-gradient with each other and with finite differences, on
    your own model, loss, inner loop and one `task`.

    The objective is the strategy's `task_loss`, as it is late in training; of a strategy whose
    outer step is its own it is MAML's, `loss(inner_adapt(model, support), query)`. In float64,
    whatever the dtypes of `model` (what `TrainState.model` holds) and `task`. Print the result, or
    assert its `.ok`.

    Raises `TypeError` if `strategy` has no `InnerLoop` in its field `inner`.
    """
    sound = isinstance(strategy, RolloutStrategy)
    fault = "has no inner loop to differentiate"
    expected = "a strategy with an `InnerLoop` in its field `inner`"
    argument = "check_meta_gradient(strategy=...)"
    check_argument(sound, strategy, argument, expected, TypeError, fault)
    _check_task(strategy, model, task, key)
    with jax.enable_x64(True):
        model, task = _to_float64((model, task))
        params, static = partition_learnt(strategy, model)

        def objective(params: PyTree, mode: str):
            chosen: Any = eqx.tree_at(lambda s: s.inner.gradient, strategy, mode)
            return _objective(chosen, eqx.combine(params, static), task, key)

        flat, unravel = jax.flatten_util.ravel_pytree(params)
        value = jax.jit(lambda x: objective(unravel(x), "reverse"))
        gradients = {}
        for mode in ("mixed", "reverse"):
            gradient = jax.jit(jax.grad(lambda x, m=mode: objective(unravel(x), m)))
            try:
                gradients[mode] = np.asarray(gradient(flat))
            except TypeError as error:
                if not refuses_mixed(error):
                    raise
                gradients[mode] = None
        directions = np.random.default_rng(0).standard_normal((_DIRECTIONS, flat.size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        slopes = np.array(
            [(value(flat + _EPS * d) - value(flat - _EPS * d)) / (2 * _EPS) for d in directions]
        )
    computed = {**gradients, "finite differences": slopes}
    not_finite = [n for n, x in computed.items() if x is not None and not np.isfinite(x).all()]
    # Infinitely wrong where there is no gradient.
    gradients = {m: np.full(flat.shape, np.inf) if g is None else g for m, g in gradients.items()}
    with np.errstate(invalid="ignore"):
        # Of complex parameters the real part: JAX's gradient is that of a real function of two.
        along = {mode: np.real(directions @ g) for mode, g in gradients.items()}
    return MetaGradientCheck(
        _relative(gradients["mixed"], gradients["reverse"]),
        _relative(along["mixed"], slopes),
        _relative(along["reverse"], slopes),
        tolerance,
        "" if isinstance(strategy, GradientStrategy) else _OWN_STEP.format(type(strategy).__name__),
        tuple(not_finite),
    )


def _objective(strategy: Strategy, model: PyTree, task: Task, key: PRNGKeyArray | None) -> Any:
    if isinstance(strategy, GradientStrategy):
        return strategy.task_loss(model, task, step=jnp.int32(_LATE), key=used_again(key))[0]
    keys = [used_again(key) for _ in range(3)]
    adapted = strategy.inner_adapt(model, task.support, key=keys[0])
    adapted = with_support_statistics(strategy.loss, adapted, task.support, key=keys[1])
    return strategy.loss(adapted, task.query, keys[2])[0]


def _check_task(strategy: Any, model: PyTree, task: Any, key: PRNGKeyArray | None) -> None:
    """That the objective can be traced for `task`, one and not a batch. Compiles nothing."""
    argument = "check_meta_gradient(task=...)"
    check_model(model, "check_meta_gradient(model=...)", trained=True)
    expected = "an `eqxmeta.Task`; of a source `tasks.sample(key)`"
    fault = "is not a task"
    check_argument(isinstance(task, Task), task, argument, expected, TypeError, fault)
    received = f"support {shapes_of(task.support)}, query {shapes_of(task.query)}"
    expected = "one task, `x: [examples, ...]`; of a batch `jax.tree.map(lambda x: x[0], tasks)`"

    def trace(task: Task) -> Any:
        return eqx.filter_eval_shape(lambda m, t: _objective(strategy, m, t, key), model, task)

    def is_batch(error: Exception) -> bool:
        return succeeds(lambda: trace(jax.tree.map(lambda x: x[0], task)))

    whose = f"`inner_adapt` and `loss`, for `{argument}`"
    with annotate_errors(whose, received, expected, seen=is_batch):
        trace(task)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
    if difference == 0:  # also where both are zero
        return 0.0
    return float(difference / size) if size > 0 and np.isfinite(difference) else np.inf


def _to_float64(tree: PyTree) -> PyTree:
    def wide(x: Any) -> Any:
        if not eqx.is_inexact_array(x):
            return x
        return jnp.asarray(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)

    return jax.tree.map(wide, tree)
