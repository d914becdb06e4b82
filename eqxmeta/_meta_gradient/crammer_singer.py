"""The linear support vector machine of several classes, solved and differentiated in its dual."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._types import Number

_STEPS = 25  # of the interior-point method; what was tried needs 12 in float32, 18 in float64


def crammer_singer(
    features: Float[Array, "n d"],
    member: Float[Array, "n k"],
    present: Bool[Array, " k"],
    weight: Float[Array, " n"],
    cost: Number,
) -> tuple[Float[Array, "k d"], Float[Array, "n k"]]:
    """`(w, α)` of the machine of Crammer and Singer 2001, without a bias. Over w and ξ it is

        min ½ Σ_k ‖w_k‖² + cost Σ_i weight_i ξ_i,  w_y·f_i - w_k·f_i ≥ 1 - ξ_i - [k = y]  (y = y_i),

    and its dual, in which `w_k = Σ_i α_ik f_i`,

        max Σ_i α_iy - ½ Σ_k ‖w_k‖²,  Σ_k α_ik = 0,  α_ik ≤ cost weight_i [k = y].

    - `member`: the labels, one-hot. `present`: the classes that there are; for others α and w are
      0, as for examples of weight 0.

    Both values agree to a share of 1e-10 in float64 and 1e-4 in float32: less precise arrays are
    widened. Differentiable once, in `features`, by the implicit function theorem: at the optimum,
    whatever way has led to it; in float32 to about a thousandth.
    """
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    features, member, weight = (x.astype(dtype) for x in (features, member, weight))
    rows = weight[:, None] * features
    # With α_i = cost weight_i (member_i - s_i) the rows s_i lie in the simplex.
    program = _Program(cost * rows @ rows.T, weight, member, present)
    alpha = cost * program.excess(_solve(program))
    return alpha.T @ rows, weight[:, None] * alpha


class _Program(eqx.Module):
    """`min ½ tr(aᵀQa) + Σ_i weight_i member_i·s_i` over the rows of s in the simplex of the classes
    that are present, where `a = member - s`. Its optimality: `z = gradient(s) + ν ≥ 0`, `sz = 0`.
    """

    kernel: Float[Array, "n n"]
    weight: Float[Array, " n"]
    member: Float[Array, "n k"]
    present: Bool[Array, " k"]

    def only(self, x: Array, other: float = 0.0) -> Array:
        """`x: [n, k]` where the class is present."""
        return jnp.where(self.present[None], x, other)

    def excess(self, s: Array) -> Array:
        """a, from the wrong classes alone, which may be so small that the right one rounds to 1."""
        wrong = self.only((1 - self.member) * s)
        return self.member * jnp.sum(wrong, axis=1, keepdims=True) - wrong

    def gradient(self, s: Array) -> Array:
        return self.weight[:, None] * self.member - self.kernel @ self.excess(s)

    def value(self, s: Array) -> Array:
        """Of the dual, which is largest at the optimum."""
        a = self.excess(s)
        return self.weight @ jnp.sum(self.member * a, axis=1) - jnp.sum(a * (self.kernel @ a)) / 2


class _Newton(eqx.Module):
    """Newton's method at (s, z, ν): with D = z/s it solves `(Q + D_k) Δs_k + Δν = right_k` for each
    class k and `Σ_k Δs_ik = 0` for each example i: a system of size n for each class, then one for
    all. D is infinite for a class that is absent."""

    inverse_root: Float[Array, "k n n"]  # V of (Q + D_k)⁻¹ = VᵀV
    schur: Float[Array, "n n"]  # the Cholesky factor of Σ_k (Q + D_k)⁻¹

    def __init__(self, program: _Program, s: Array, z: Array, damping: float):
        root = program.only(jnp.sqrt(s / z)).T  # [k, n]
        eye = jnp.eye(len(s), dtype=s.dtype)
        # More examples than features make Q singular. The residual is exact, so that the optimum
        # is, whatever the damping.
        kernel = program.kernel * (1 + damping * eye)
        scaled = eye[None] + root[:, :, None] * kernel[None] * root[:, None, :]
        factor, diagonal = jnp.linalg.cholesky(scaled), eye[None] * root[:, :, None]
        self.inverse_root = jax.scipy.linalg.solve_triangular(factor, diagonal, lower=True)
        every = self.inverse_root.reshape(-1, len(s))
        self.schur = jnp.linalg.cholesky(every.T @ every)

    def __call__(self, right: Array) -> tuple[Array, Array]:
        """`(Δs, Δν)`."""
        apart = self._divide(right)
        multiplier = jax.scipy.linalg.cho_solve((self.schur, True), jnp.sum(apart, axis=1))
        return apart - self._divide(jnp.broadcast_to(multiplier[:, None], right.shape)), multiplier

    def _divide(self, right: Array) -> Array:
        half = jnp.einsum("kij,jk->ki", self.inverse_root, right)
        return jnp.einsum("kij,ki->jk", self.inverse_root, half)


def _solve(program: _Program) -> Float[Array, "n k"]:
    """s, by Mehrotra's predictor and corrector."""
    fixed = jax.lax.stop_gradient(program)
    only, count = fixed.only, len(fixed.weight) * jnp.sum(fixed.present)
    eps = float(jnp.finfo(fixed.kernel.dtype).eps)
    precision = 1e-10 if fixed.kernel.dtype == jnp.float64 else 1e-7

    def residual(program: _Program, s: Array, z: Array, multiplier: Array) -> Array:
        return only(z - program.gradient(s) - multiplier[:, None])

    def mean(product: Array) -> Array:
        return jnp.sum(only(product)) / count

    def step(_: Array, point: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        s, z, multiplier = point
        newton, error = _Newton(fixed, s, z, len(s) * eps), residual(fixed, *point)

        def direction(change: Array) -> tuple[Array, Array, Array]:
            """Along which sz changes by `change`."""
            ds, d_multiplier = newton(only(error + change / s))
            return ds, only((change - z * ds) / s), d_multiplier

        ds, dz, _ = direction(-s * z)
        after = mean((s + _length(s, ds) * ds) * (z + _length(z, dz) * dz))
        # What is left of the gap in the end: not zero, where no step has an inverse.
        end = precision * (jnp.abs(fixed.value(s)) + eps) / count
        target = jnp.maximum(after**3 / mean(s * z) ** 2, end)
        ds, dz, d_multiplier = direction(target - s * z - ds * dz)
        dual = _length(z, dz)
        return s + _length(s, ds) * ds, z + dual * dz, multiplier + dual * d_multiplier

    start = only(jnp.ones_like(fixed.member) / jnp.sum(fixed.present), 1.0)
    slope = fixed.gradient(start)
    multiplier = 1 - jnp.min(only(slope, jnp.inf), axis=1)
    point = start, only(slope + multiplier[:, None], 1.0), multiplier
    s, z, multiplier = jax.lax.fori_loop(0, _STEPS, step, point)
    # One more of Newton's steps, to `sz = 0`, in which only the residual is differentiated: its
    # derivative is that of the solution. In float32 it would be little but rounding where support
    # vectors nearly depend on each other; this damping costs it a thousandth.
    return s + _Newton(fixed, s, z, eps**0.5)(residual(program, s, z, multiplier) - z)[0]


def _length(x: Array, dx: Array) -> Array:
    """How much of the step `dx` keeps x positive, at most all of it."""
    falling = dx < 0
    limits = jnp.where(falling, -x / jnp.where(falling, dx, -1.0), jnp.inf)
    return jnp.minimum(1.0, 0.99 * jnp.min(limits))
