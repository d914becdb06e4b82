"""Conjugate gradients that end where the system is seen not to be positive definite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def conjugate_gradients(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    b: Float[Array, " n"],
    steps: int,
    *,
    least: float = 0.0,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """`(x, bent)`: the solution of `A x = b` for a symmetric A, given as `product(p) = A p`.

    From zero, in at most `steps` steps, until the residual is that of rounding. A direction p with
    `p·A p <= least p·p`, of which an A with larger eigenvalues has none, ends it: `x` is then what
    was found before, or b if it is the first one, and `bent` is true (Nocedal, Wright 2006,
    Numerical Optimization, algorithm 7.1). So `x·b` is positive, whatever A is, unless b is zero.
    """

    def dot(x: Array, y: Array) -> Array:
        return jnp.vdot(x, y, precision="highest")

    size = dot(b, b)
    enough = jnp.finfo(b.dtype).eps ** 2 * size

    def unfinished(state: tuple) -> Array:
        *_, rr, k, bent = state
        return (rr > enough) & (k < steps) & ~bent

    def step(state: tuple) -> tuple:
        x, r, p, rr, k, _ = state
        ap = product(p)
        curvature = dot(p, ap)
        bent = curvature <= least * dot(p, p)
        rate = jnp.where(bent, 0, rr / jnp.where(bent, 1, curvature))
        x = jnp.where(bent & (k == 0), b, x + rate * p)
        r = r - rate * ap
        new = dot(r, r)
        return x, r, r + new / rr * p, new, k + 1, bent

    start = (jnp.zeros_like(b), b, b, size, jnp.int32(0), jnp.bool_(False))
    x, *_, bent = jax.lax.while_loop(unfinished, step, start)
    return x, bent
