"""The gradient of an inner loss, in a form whose own derivative is cheap: the modes of
`InnerLoop(gradient=...)`."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float, PyTree

from .._errors import explain
from .._jaxpr.flops import equations
from .._keys import used_again

GradientMode: TypeAlias = Literal["mixed", "reverse", "first_order"]
GRADIENT_MODES: tuple[GradientMode, ...] = get_args(GradientMode)

InnerLoss: TypeAlias = Callable[[PyTree, PyTree], Float[Array, ""]]


class MixedModeError(TypeError):
    """`gradient="mixed"` is not for this model or inner loss."""


def refuses_mixed(error: Exception) -> bool:
    """Whether mixed mode failed because it is not for this model or loss: our error, or JAX's own
    where it notices only later."""
    return isinstance(error, MixedModeError) or (
        isinstance(error, TypeError) and "forward-mode" in str(error)
    )


def value_and_grad(
    fun: InnerLoss, mode: GradientMode, fast: PyTree, rest: PyTree
) -> tuple[Float[Array, ""], PyTree]:
    """Value of `fun(fast, rest)` and its gradient in `fast`, to be differentiated again by `mode`.

    - `"mixed"`: forward over reverse. The second derivative needs no stored activations, only
      `fast` and `rest` themselves (Kemaev et al. 2025, arXiv 2505.00793). Exact if the
      Jacobian of `fun`'s gradient is symmetric, as it is unless a `jax.custom_vjp` or
      `jax.custom_jvp` in it has a rule that is not the derivative. (What `stop_gradient` hides is a
      constant in both modes, and of the rest the gradient is a true gradient.)
    - `"reverse"`: reverse over reverse, what JAX does by itself. Exact for every `fun`.
    - `"first_order"`: the gradient counts as a constant (Finn et al. 2017, section 5.2).

    `fast` is a pytree of inexact arrays; `rest` holds everything else, of which inexact arrays
    are differentiated too. The value is for reporting: it counts as a constant in every mode.
    """
    if mode == "mixed":
        value, grad = _mixed(fun, fast, rest)
    else:
        value, grad = jax.value_and_grad(fun)(fast, rest)
        if mode == "first_order":
            grad = jax.lax.stop_gradient(grad)
    return jax.lax.stop_gradient(value), grad


def conjugate_complex(grads: PyTree) -> PyTree:
    """Gradients as optax takes them. Of a complex parameter `jax.grad` gives the conjugate of the
    direction in which the loss grows fastest."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


# Under `vmap` over tasks the gradient of what the loss stops is the same zero in every task. What
# comes back to it must be added up over tasks, which later versions of JAX do only if told to.
_BATCHING: dict[str, Any] = (
    {"generic_batching": True}
    if "generic_batching" in inspect.signature(jax.custom_vjp.defvjp).parameters
    else {}
)


def _mixed(fun: InnerLoss, fast: PyTree, rest: PyTree) -> tuple[Float[Array, ""], PyTree]:
    _refuse_complex(fast)
    # A custom_vjp must receive whatever it differentiates as an argument: closing over a tracer
    # of an outer transformation fails. `rest` is most of it; what `fun` closes over by itself, such
    # as the arrays of a loss that is a module, tracing it finds.
    arrays, static = eqx.partition(rest, eqx.is_array)
    closed = jax.make_jaxpr(lambda fast, arrays: fun(fast, eqx.combine(arrays, static)))(
        fast, arrays
    )
    count = len(closed.consts)
    smooth, others = eqx.partition([*closed.consts, *jax.tree.leaves(arrays)], eqx.is_inexact_array)

    def loss(fast: PyTree, smooth: PyTree, others: PyTree) -> Float[Array, ""]:
        inputs = eqx.combine(smooth, others)
        as_called = ClosedJaxpr(closed.jaxpr, inputs[:count])
        (value,) = jaxpr_as_fun(as_called)(*jax.tree.leaves(fast), *inputs[count:])
        return value

    @jax.custom_vjp
    def run(fast: PyTree, smooth: PyTree, others: PyTree):
        return jax.value_and_grad(loss)(fast, smooth, others)

    def forward(fast: PyTree, smooth: PyTree, others: PyTree):
        # The residuals are the inputs alone: this is where the memory is saved.
        return run(fast, smooth, used_again(others)), (fast, smooth, others)

    def backward(residuals: Any, cotangents: Any):
        fast, smooth, others = used_again(residuals)
        _, direction = cotangents  # the value's cotangent is zero, see above
        # The same numbers, but XLA cannot tell (0 times infinity is not 0). Else it would find that
        # a step outside of a loop has been evaluated before, and keep all of that evaluation for
        # this one; `optimization_barrier` does not stop it on a CPU.
        fast = jax.tree.map(lambda x, v: x + 0 * v, fast, direction)

        def gradients(fast: PyTree):
            return jax.grad(loss, argnums=(0, 1))(fast, smooth, others)

        # d/d(fast, smooth) <grad_fast, direction> = (H_ff v, H_sf v): because second derivatives
        # commute, both are one directional derivative of the whole gradient along `fast`.
        def derivative(fast: PyTree, direction: PyTree):
            return jax.jvp(gradients, (fast,), (direction,))[1]

        try:
            closed, shape = jax.make_jaxpr(derivative, return_shape=True)(fast, direction)
        except TypeError as error:
            if not refuses_mixed(error):
                raise
            raise _mixed_mode_error() from error
        # Without a `vmap` around it, JAX itself would notice no sooner than when it compiles.
        if any(eqn.primitive.name == "custom_lin" for eqn in equations(closed.jaxpr)):
            raise _mixed_mode_error()
        out = jaxpr_as_fun(closed)(*jax.tree.leaves((fast, direction)))
        along_fast, along_smooth = jax.tree.unflatten(jax.tree.structure(shape), out)
        return along_fast, along_smooth, None

    run.defvjp(forward, backward, **_BATCHING)
    return run(fast, smooth, used_again(others))


def _mixed_mode_error() -> MixedModeError:
    message = "`gradient='mixed'` cannot differentiate this inner loss forwards."
    received = "a `jax.custom_vjp` whose forward rule calls the function itself"
    expected = "a loss that JAX can differentiate in both modes, or `gradient='reverse'`"
    return MixedModeError(explain(message, received, expected))


def _refuse_complex(fast: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(fast):
        if jnp.iscomplexobj(leaf):
            message = "`gradient='mixed'` differentiates real parameters only."
            received = f"leaf `model{jax.tree_util.keystr(path)}` of dtype {leaf.dtype}"
            expected = "real parameters, or `gradient='reverse'`"
            raise MixedModeError(explain(message, received, expected))
