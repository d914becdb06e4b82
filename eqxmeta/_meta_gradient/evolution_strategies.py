"""Evolution strategies: the meta-gradient from values alone."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import check_int, check_number
from .._errors import explain
from .._task.layout import sum_dtype
from .._types import Number
from .estimator import Objective

# `fold_in(key, i)` is the i-th key of `split(key, n)`, and those are the tasks'.
_PERTURBATIONS = 2**32 - 1


class EvolutionStrategies(eqx.Module):
    """An `Estimator` of the meta-gradient that does not differentiate: antithetic evolution
    strategies.

    With `θ` what is learnt, `L` the objective and `ε ~ N(0, I)`, the mean over `pairs` draws of
    `(L(θ + σ ε) - L(θ - σ ε)) / 2σ · ε`: unbiased for the gradient of `L` smoothed by a Gaussian of
    standard deviation `sigma` (Salimans et al. 2017, arXiv 1703.03864; for MAML Song et al. 2020,
    arXiv 1910.01215). For long, rough inner loops, and for losses that jump.

        em.MAML(loss, inner, optax.adam(1e-3), estimator=em.EvolutionStrategies(0.01, pairs=64))

    - `sigma`: σ, in the units of the parameters, one for all of them.
    - `pairs`: pairs of values an outer step, one pair after another: time grows with it, memory
      does not. The relative error falls with `sqrt(parameters / pairs)`.

    Every task of an outer step, in whatever chunk, sees the same perturbations, and both values of
    a pair the same dropout. The gradient is that of the value: what `stop_gradient` or
    `"first_order"` hides counts.

    Persistent evolution strategies (Vicol et al. 2021, arXiv 2112.13835) are another estimator, of
    inner loops that are cut into pieces between which the outer optimizer steps. It is not here: it
    needs the state of each task's inner loop, and the sum of its perturbations, to live from one
    outer step to the next, while a `TrainState` knows of no task and each step draws new ones.

    Raises `TypeError` or `ValueError` for arguments that are not as above, and `ValueError` for an
    outer step with `key=None`.
    """

    sigma: Number
    pairs: int

    def __init__(self, sigma: Number, pairs: int):
        self.sigma = check_number(sigma, "EvolutionStrategies(sigma=...)", positive=True)
        argument = "EvolutionStrategies(pairs=...)"
        self.pairs = check_int(pairs, argument, minimum=1, what="pairs of values an outer step")

    def __call__(self, objective: Objective, params: PyTree, *, key: PRNGKeyArray | None):
        if key is None:
            message = "`EvolutionStrategies` draws perturbations, and has no key."
            raise ValueError(explain(message, "`key=None`", "`outer_update(..., key=...)`, a key"))
        leaves, structure = jax.tree.flatten(params)
        key = jax.random.fold_in(key, _PERTURBATIONS)

        def value(noise: list[Array], sign: float) -> Array:
            pairs = zip(leaves, noise, strict=True)
            moved = [x + (sign * self.sigma * e).astype(x.dtype) for x, e in pairs]
            return objective(jax.tree.unflatten(structure, moved))[0]

        def add(total: list[Array], index: Array):
            keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
            noise = [_normal(k, x) for k, x in zip(keys, leaves, strict=True)]
            slope = (value(noise, 1.0) - value(noise, -1.0)) / (2 * self.sigma * self.pairs)
            return [t + slope.astype(t.dtype) * e for t, e in zip(total, noise, strict=True)], None

        zeros = [jnp.zeros(x.shape, sum_dtype(x.dtype)) for x in leaves]
        total, _ = jax.lax.scan(add, zeros, jnp.arange(self.pairs))
        grads = [t.astype(x.dtype) for t, x in zip(total, leaves, strict=True)]
        return objective(params), jax.tree.unflatten(structure, grads)


def _normal(key: PRNGKeyArray, x: Array) -> Array:
    """Of variance one; of a complex number in both parts (JAX's has one in all)."""
    scale = math.sqrt(2) if jnp.iscomplexobj(x) else 1.0
    return scale * jax.random.normal(key, x.shape, sum_dtype(x.dtype))
