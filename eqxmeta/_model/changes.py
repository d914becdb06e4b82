"""What a step changed of a state and must not have."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

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
