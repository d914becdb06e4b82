"""What several test files share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree


def tree_allclose(x: PyTree, y: PyTree, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether two pytrees agree: structure, shapes, dtypes, and values within tolerance.

    Leaves that are not arrays must be equal. With `rtol=0, atol=0` arrays must be the same bits
    (NaN equals NaN).
    """
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    return all(
        _leaf_allclose(a, b, rtol, atol)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def _leaf_allclose(a: object, b: object, rtol: float, atol: float) -> bool:
    if not (eqx.is_array_like(a) and eqx.is_array_like(b)):
        return bool(a == b)
    a, b = _as_numpy(a), _as_numpy(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not jnp.issubdtype(a.dtype, jnp.inexact) or (rtol == 0 and atol == 0):
        return a.tobytes() == b.tobytes()
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    return np.allclose(a.astype(wide), b.astype(wide), rtol=rtol, atol=atol, equal_nan=True)


def _as_numpy(x) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


class TinyMLP(eqx.Module):
    """One hidden layer of 8: `[1] -> [1]`."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(1, 8, key=first)
        self.out = eqx.nn.Linear(8, 1, key=second)

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.tanh(self.hidden(x)))


def tiny_mlp(key: PRNGKeyArray | None = None) -> TinyMLP:
    """A regression model that compiles and trains in no time."""
    return TinyMLP(jax.random.key(0) if key is None else key)
