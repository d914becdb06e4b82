"""What can be wrong with a user's model before it is traced."""

import inspect

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._arguments import check_argument
from .._errors import explain, warn
from .holder import HoldsModel
from .state import MetaParameters


def check_model(
    model: PyTree, argument: str, *, trained: bool = False, baseline: bool = False
) -> None:
    """Refuse what cannot be meta-learnt correctly. Raises `TypeError` or `ValueError`.

    `trained`: what `TrainState.model` holds is meant, which may be more than the user's model.
    `baseline`: it may have nothing to learn."""
    expected = "an instance of an Equinox module"
    fault = "is not a model but the class"
    check_argument(not isinstance(model, type), model, argument, expected, TypeError, fault)
    if isinstance(model, HoldsModel) and not (trained and isinstance(model, MetaParameters)):
        received = f"a `{type(model).__name__}`, which holds a model and more"
        inside = "state.model.model" if isinstance(model, MetaParameters) else "state.model"
        expected = f"the model in it, `{inside}`; to go on with a run `fit(..., resume=)`"
        raise TypeError(explain(f"`{argument}` is not a model.", received, expected))
    if hasattr(model, "sample") and not callable(model):
        message = f"`{argument}` is a task source, not a model."
        expected = f"{expected} first, the tasks second: `fit(model, tasks)`"
        raise ValueError(explain(message, repr(model)[:200], expected))
    check_stateless(model, argument)
    # What JAX has wrapped, such as `jax.vmap(model)`, is a function, in which they are hidden.
    hidden = _has_parameters(getattr(model, "__wrapped__", None))
    if not _has_parameters(model) and (hidden or not (baseline and callable(model))):
        expected = "at least one floating-point array"
        if inspect.isroutine(model):
            expected += (
                ". A function such as `jax.vmap(model)` hides them, and there is no batch axis: "
                "pass the model itself, one example in, one output out"
            )
        raise ValueError(explain(f"`{argument}` has no parameters.", repr(model)[:200], expected))


def warn_duplicates(model: PyTree, argument: str) -> None:
    """One array object in two places looks tied, and is not: every place is learnt by itself."""
    places: dict[int, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if eqx.is_inexact_array(leaf):
            places.setdefault(id(leaf), []).append(f"model{jax.tree_util.keystr(path)}")
    if twice := [" = ".join(names) for names in places.values() if len(names) > 1]:
        message = f"`{argument}` has one array in several places, which the first step unties."
        received = "; ".join(twice[:5]) + "; ..." * (len(twice) > 5)
        expected = "`eqx.nn.Shared` for what is to stay tied, arrays of their own for what is not"
        warn(explain(message, received, expected))


def check_stateless(model: PyTree, argument: str) -> None:
    """Running statistics would need a policy for whose they are: one task's, or the run's. Without
    one they would silently leak between tasks. Raises `ValueError`."""
    stateful = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_state)
        if _is_state(leaf)
    ]
    if stateful:
        message = f"`{argument}` has layers with state (such as `eqx.nn.BatchNorm`)."
        received = f"state at {', '.join('model' + path for path in stateful)}"
        expected = (
            "a model without state: for `eqx.nn.BatchNorm` `eqxmeta.nn.SupportNorm` or "
            "`eqxmeta.nn.BatchNorm`, which keep no averages, `eqx.nn.LayerNorm` or "
            "`eqx.nn.GroupNorm`; for `eqx.nn.SpectralNorm` `eqx.nn.WeightNorm`"
        )
        raise ValueError(explain(message, received, expected))


def check_no_nan(model: PyTree, argument: str) -> None:
    """NaN in a parameter is never meant; infinity may be, as in a mask. Raises `ValueError`."""
    bad = [
        f"model{jax.tree_util.keystr(path)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        if eqx.is_inexact_array(leaf) and np.isnan(np.asarray(leaf)).any()
    ]
    if bad:
        message = f"`{argument}` has NaN among its parameters."
        raise ValueError(explain(message, ", ".join(bad), "finite numbers"))


def _is_state(x: object) -> bool:
    return isinstance(x, eqx.nn.State | eqx.nn.StateIndex)


def _has_parameters(tree: PyTree) -> bool:
    return any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(tree))


def count_parameters(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf))
