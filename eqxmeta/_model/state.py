"""The state of a run: what is meta-learnt, and the state of the outer optimizer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from .._errors import explain
from .holder import HoldsModel
from .support_statistics import without_statistics


class TrainState(HoldsModel):
    """Everything that a run learns.

    - `step`: outer steps taken so far, int32 scalar. The trainer owns it.
    - `model`: what is meta-learnt. The user's own model, or a `MetaParameters` of it for
      strategies that learn more than an initialisation.
    - `opt_state`: state of the outer optimizer.

    What changes from step to step is an array. Other leaves, such as a number of Python or a
    string, may be there as long as no step changes them: `fit` refuses that, naming the leaf.
    """

    step: Int[Array, ""]
    model: PyTree
    opt_state: PyTree


@eqx.filter_jit
def copied(state: TrainState) -> TrainState:
    """The same values in buffers of their own."""
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)


class MetaParameters(HoldsModel):
    """What `TrainState.model` holds where more than the user's model is meta-learnt.

    - `model`: the user's own, from which tasks start.
    - `extra`: the rest, any pytree: every inexact array in it is learnt.
    """

    model: PyTree
    extra: PyTree


def own_model(model: PyTree) -> PyTree:
    """The user's own part of what `TrainState.model` holds."""
    return model.model if isinstance(model, MetaParameters) else model


def meta_parameters(model: Any, strategy: str) -> MetaParameters:
    """`model`. Raises `TypeError` if it is not what a `strategy` that learns more than it has."""
    if not isinstance(model, MetaParameters):
        message = f"`model` is not all that `{strategy}` learns."
        expected = f"what `TrainState.model` holds: `{strategy}(...).init(model).model`, or a "
        raise TypeError(explain(message, type(model).__name__, expected + "trained one"))
    return model


def without_weak_types(tree: PyTree) -> PyTree:
    """Arrays of `tree` as JAX arrays without weak types, so that a loop may carry them."""
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype) if eqx.is_array(x) else x, tree)


def without_values(tree: PyTree) -> PyTree:
    """`tree` with shapes and dtypes in the place of its large arrays. Small ones cost nothing; they
    and what `optax.inject_hyperparams` keeps are looked at: the step, the rate of an optimizer."""

    def shape_of(path: Any, x: Any) -> Any:
        asked = ".hyperparams[" in jax.tree_util.keystr(path)
        large = eqx.is_array(x) and x.size > 10_000 and not asked
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if large else x

    return jax.tree_util.tree_map_with_path(shape_of, tree)


def to_be_trained(model: PyTree) -> PyTree:
    """`model` as a state holds it: its arrays as JAX arrays, without what it knows of a task."""
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    return without_weak_types(without_statistics(model))


STATE_EXPECTED = (
    "every leaf of the new state as in the old one; what changes from step to step is an array, "
    "such as `jnp.asarray(0)`"
)


def changes(old: PyTree, new: PyTree, *, cast: bool = False) -> list[str]:
    """By name, what a step changed and must not: the shape or dtype of an array (with `cast` the
    dtype may change), the value of another leaf (in a compiled loop every step would see the first
    one), and what is static. `old` and `new` may hold shapes for arrays."""
    before, after = _leaves(old), _leaves(new)
    pairs = {path: (before.get(path), after.get(path)) for path in before | after}
    found = [
        f"{path}: {_show(a)} -> {_show(b)}"
        for path, (a, b) in pairs.items()
        if not _same(a, b, cast)
    ]
    if not found and jax.tree.structure(old) != jax.tree.structure(new):
        found = _static_changes(old, new, "")
    return found


def _static_changes(old: PyTree, new: PyTree, path: str) -> list[str]:
    """Of trees whose leaves have the same names."""
    (a, shape), (b, other) = (
        jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda part, x=x: part is not x)
        for x in (old, new)
    )
    if shape != other:
        return [f"{path}: {str(shape)[:200]} -> {str(other)[:200]}".lstrip(".")]
    parts = [
        (path + jax.tree_util.keystr(key), x, y)
        for (key, x), (_, y) in zip(a, b, strict=True)
        if key
    ]
    return [line for name, x, y in parts for line in _static_changes(x, y, name)]


def _leaves(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _same(a: Any, b: Any, cast: bool) -> bool:
    if _is_array(a) and _is_array(b):
        return a.shape == b.shape and (cast or a.dtype == b.dtype)
    return a is b or (not (_is_array(a) or _is_array(b)) and bool(a == b))


def _show(x: Any) -> str:
    if _is_array(x):
        return f"{x.dtype.name}{list(x.shape)}"
    return repr(x)[:100]


def update_of(
    optimizer: optax.GradientTransformation, name: str
) -> Callable[[PyTree, PyTree, PyTree, Array], tuple[PyTree, PyTree]]:
    """`update(grads, state, params, value)` of `optimizer`, given also the value that is descended
    if it wants that, as `optax.contrib.reduce_on_plateau` does. Raises `TypeError`, naming it,
    for one that wants more."""

    def with_value(grads: PyTree, state: PyTree, params: PyTree, value: Array) -> Any:
        # Not by its class: `MultiSteps` takes what it hands on, and `sam` does not.
        for extra in ({"value": value}, {}):
            try:
                return optimizer.update(grads, state, params, **extra)  # pyright: ignore
            except TypeError as error:
                if extra and "unexpected keyword argument 'value'" in str(error):
                    continue
                if "required keyword-only argument" not in str(error):
                    raise
                message = f"{name} wants more than a step has."
                expected = (
                    "an optimizer that needs gradients, parameters and `value`, the loss, at most; "
                    "no line search, such as `optax.lbfgs` makes"
                )
                raise TypeError(explain(message, error, expected)) from error

    return with_value
