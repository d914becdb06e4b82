"""Estimators of the meta-gradient: how the objective of an outer step is descended."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .modes import conjugate_complex

# From the learnt parameters to what is descended, and metrics.
Objective: TypeAlias = Callable[[PyTree], tuple[Float[Array, ""], dict[str, Array]]]


@runtime_checkable
class Estimator(Protocol):
    """`estimator(objective, params, key=key) -> ((value, metrics), grads)`.

    - `objective(params) -> (value, metrics)`: the mean over some tasks; `value` and `metrics` are
      returned as they are at `params`.
    - `params`: the learnt leaves alone. `grads` is a tree like it: the direction in which the
      objective grows fastest.
    - `key`: the outer step's, the same for every chunk of tasks and on every device, so that the
      result depends on neither.
    """

    def __call__(
        self, objective: Objective, params: PyTree, *, key: PRNGKeyArray | None
    ) -> tuple[tuple[Float[Array, ""], dict[str, Array]], PyTree]: ...


class ReverseMode(eqx.Module):
    """The exact gradient, by `jax.value_and_grad`. How it goes through an inner loop is the loop's
    affair, see `InnerLoop(gradient=...)`."""

    def __call__(self, objective: Objective, params: PyTree, *, key: Any = None):
        out, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return out, conjugate_complex(grads)
