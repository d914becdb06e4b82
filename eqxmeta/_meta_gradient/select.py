"""Parts of a model, said by a function of it."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._errors import annotate_errors, explain, has_no_such_part

_EXPECTED = "a function from the model to parts that it has, such as `lambda m: m.layers[-1]`"


def select(model: PyTree, where: Callable[[Any], PyTree], argument: str) -> tuple[PyTree, PyTree]:
    """`(chosen, others)`, as `eqx.partition`: `chosen` are the inexact arrays in `where(model)`."""
    return eqx.partition(model, selection(model, where, argument))


def selection(
    model: PyTree,
    where: Callable[[Any], PyTree],
    argument: str,
    *,
    of: Callable[[Any], PyTree] | None = None,
) -> PyTree:
    """A tree of bools like `model`: whether a leaf is an inexact array in `where(model)`.

    `where` returns a part of the model or any pytree of such parts. A part is known by its place:
    of two leaves that happen to be the same array, only the one that was named is chosen.

    `of`: `where` is a function of `of(model)`, a part of the model beside which all is chosen. If
    there is anything beside it, `where` may return `()`, nothing.

    Raises `ValueError` if `where(model)` holds no inexact array, one that is not the model's, or a
    method of the model; `argument` names `where` in the message.
    """
    params, others = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    chosen = [False] * len(leaves)
    returned: list[type] = []
    nothing = True

    def mark(leaves: list[Any]) -> None:
        nonlocal nothing
        # Traced, because there every leaf is an object of its own.
        index = {id(leaf): i for i, leaf in enumerate(leaves)}
        whole = eqx.combine(jax.tree.unflatten(structure, leaves), others)
        part = whole if of is None else of(whole)
        received = f"a `{type(part).__name__}`"
        with annotate_errors(f"`{argument}`", received, _EXPECTED, seen=has_no_such_part):
            parts = where(part)

        def bound(x: Any) -> bool:
            return _is_method(x, part)

        if any(map(bound, jax.tree.leaves(parts, is_leaf=bound))):
            message = f"`{argument}` returned a method, which holds all of the model."
            raise ValueError(explain(message, f"a method of `{type(part).__name__}`", _EXPECTED))
        returned.extend(type(leaf) for leaf in jax.tree.leaves(parts))
        for leaf in filter(eqx.is_inexact_array, jax.tree.leaves(parts)):
            if id(leaf) not in index:
                message = f"`{argument}` returned an array that is not the model's."
                expected = "parts of the model as they are, such as `lambda m: m.layers[-1]`"
                raise ValueError(explain(message, f"{leaf.dtype.name}{list(leaf.shape)}", expected))
            chosen[index[id(leaf)]] = True
        beside = index.keys() - {id(leaf) for leaf in jax.tree.leaves(part)}
        nothing = not any(chosen) and not (beside and isinstance(parts, tuple) and not parts)
        for leaf in beside:
            chosen[index[leaf]] = True

    jax.eval_shape(mark, leaves)
    if nothing:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        mask = ". By a mask: `lambda m: eqx.filter(m, mask)`" if set(returned) == {bool} else ""
        message = f"`{argument}` chooses nothing of the model."
        expected = (
            "one or more of "
            + (", ".join("model" + jax.tree_util.keystr(path) for path in paths[:20]))
            + (", ..." if len(paths) > 20 else "")
            + mask
        )
        raise ValueError(explain(message, "no floating-point array", expected))
    answers = iter(chosen)
    return jax.tree.map(lambda x: eqx.is_inexact_array(x) and next(answers), model)


class _Bound(eqx.Module):
    """Equinox has no public name for the class of its bound methods."""

    def method(self) -> None: ...


_BoundMethod = type(_Bound().method)


def _is_method(x: Any, model: PyTree) -> bool:
    """Whether `x` is bound to a model, as `model.features` is: to JAX a tree with `model` in it.
    (A method under `eqx.filter_jit` is a `Partial` of the model.)"""
    if isinstance(x, eqx.Partial):
        return any(arg is model for arg in x.args)
    return inspect.ismethod(x) or isinstance(x, _BoundMethod)
