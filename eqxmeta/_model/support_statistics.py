"""Statistics of the support set: how a layer that normalises with them gets them.

A model is called with one example at a time, and `predict` maps it over a batch. While a model
adapts, such a layer takes the mean over the examples that are mapped together, the support set.
What has been adapted is then run over the support set once more, the layers' statistics under the
adapted weights are stored in it, and each query is normalised with these, whatever the others are.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._errors import explain
from .._types import Loss

# The name of the axis over which `predict` maps the model.
EXAMPLES = "eqxmeta.examples"


class SupportLayer(eqx.Module):
    """A layer that sees other examples than its own: those of the support set.

    Its `__call__` computes the statistics of the batch, with `mean_over_examples`, and uses what
    `support_statistics(self, batch)` makes of them. The field `statistics` is `None`, except in a
    model that `with_support_statistics` has returned.
    """

    statistics: eqx.AbstractVar[PyTree]


class TransductiveLayer(eqx.Module):
    """A layer that sees the examples that are predicted together with its own, queries too."""


def has_layer(model: PyTree, kind: type) -> bool:
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(leaf, kind) for leaf in leaves)


def with_support_statistics(
    loss: Loss, model: PyTree, support: PyTree, *, key: PRNGKeyArray | None = None
) -> PyTree:
    """`model` with the statistics that its layers have on the `support` examples, where it needs
    any (`eqxmeta.nn.SupportNorm`): then it can be called with one example. Others are returned as
    they are.

    What comes out of a strategy's `inner_adapt` and of `evaluate` has them already. It is for
    strategies of your own that compute a query loss by themselves: differentiable, and cheap
    (one forward pass). `loss` is what the model adapts with, called once, `key` for its dropout;
    the statistics are found where it uses `eqxmeta.losses.predict`. A model that has statistics
    keeps them.

    Raises `ValueError` if they cannot be found: the loss calls the model within a transformation
    of its own (`jax.jit`, `jax.checkpoint`, a loop), or calls one layer twice.
    """
    return fill_statistics(model, lambda model: loss(model, support, key))


def fill_statistics(model: PyTree, run: Callable[[PyTree], Any]) -> PyTree:
    """`model` with the statistics that its layers meet in `run(model)`, which `predict`s for the
    support set. Layers that have statistics keep them."""
    if not has_layer(model, SupportLayer):
        return model
    layers = 0

    def number(layer: SupportLayer) -> SupportLayer:
        nonlocal layers
        layers += 1
        return _with(layer, Placeholder(layers)) if layer.statistics is None else layer

    model = _map_layers(number, model)
    found: dict[int, PyTree] = {}
    with _set(_found, (get_opaque_trace_state(convention="eqxmeta"), found)):
        run(model)

    def fill(layer: SupportLayer) -> SupportLayer:
        wanted = layer.statistics
        # A layer that was not used stays marked, and says so if it is used on a query.
        is_found = isinstance(wanted, Placeholder) and wanted.index in found
        return _with(layer, found[wanted.index]) if is_found else layer

    return _map_layers(fill, model)


def without_statistics(model: PyTree) -> PyTree:
    """`model` as it was before `fill_statistics`: what adapts, and what is meta-learnt."""
    if not has_layer(model, SupportLayer):
        return model
    return _map_layers(lambda layer: _with(layer, None), model)


def map_examples(
    fun: Callable[..., Any], *xs: PyTree, weight: Float[Array, " n"] | None = None
) -> Any:
    """`jax.vmap(fun)(*xs)`, along the axis over which layers may take a mean, by these weights."""
    if weight is not None:

        def weighted(weight: Array, *xs: PyTree) -> Any:
            with _set(_weight, (get_opaque_trace_state(convention="eqxmeta"), weight)):
                return fun(*xs)

        return _map_examples(weighted, weight, *xs)
    with _set(_weight, None):  # within a model that is mapped itself there may be some
        return _map_examples(fun, *xs)


def _map_examples(fun: Callable[..., Any], *xs: PyTree) -> Any:
    searching = _found.get()
    if searching is None:
        return jax.vmap(fun, axis_name=EXAMPLES)(*xs)
    trace, found = searching
    if trace != get_opaque_trace_state(convention="eqxmeta"):
        raise _out_of_reach("`eqxmeta.losses.predict` was called", "the loss")

    def reporting(*xs: PyTree) -> tuple[Any, dict[int, PyTree]]:
        reports: dict[int, PyTree] = {}
        with _set(_reports, (get_opaque_trace_state(convention="eqxmeta"), reports)):
            return fun(*xs), reports

    # The statistics leave as what they are, a result of the mapped function: the same for every
    # example.
    mapped = jax.vmap(reporting, axis_name=EXAMPLES, out_axes=(0, None))
    out, reports = mapped(*xs)
    if found.keys() & reports.keys():
        raise _used_twice("by two calls of `eqxmeta.losses.predict`")
    found.update(reports)
    return out


def mean_over_examples(x: PyTree) -> PyTree:
    """The mean of `x` over the examples that are predicted together, by their weights if they have
    any."""
    weighted = _weight.get()
    if weighted is None:
        return jax.lax.pmean(x, EXAMPLES)
    trace, weight = weighted
    if trace != get_opaque_trace_state(convention="eqxmeta"):
        message = "The weights of the examples cannot be taken into a transformation."
        received = "a layer that was called inside of a `jit`, `checkpoint`, `vmap` or loop of the "
        received += "model's own"
        expected = "the call outside of it: strategies compile the model as a part of the whole"
        raise ValueError(explain(message, received, expected))
    total = jax.lax.psum(weight, EXAMPLES)

    def mean(x: Array) -> Array:
        w = weight.astype(x.dtype)
        return jax.lax.psum(jnp.where(w > 0, w * x, 0), EXAMPLES) / total.astype(x.dtype)

    return jax.tree.map(mean, x)


def count_examples(layer: str) -> int:
    """How many examples are predicted together. Raises `ValueError`, naming `layer`, outside of
    `predict`."""
    try:
        return jax.lax.axis_size(EXAMPLES)
    except NameError as error:
        message = f"`{layer}` normalises with statistics of a batch, and was called without one."
        received = "a call of the model for one example, or by `jax.vmap(model)`"
        expected = (
            "`eqxmeta.losses.predict(model, x)` for the examples `x` that belong together; for "
            "single queries the model that a strategy's `inner_adapt` returns, with "
            "`SupportNorm`"
        )
        raise ValueError(explain(message, received, expected)) from error


def support_statistics(layer: SupportLayer, batch: Callable[[], PyTree]) -> PyTree:
    """The stored statistics, if there are any; otherwise those of the batch, `batch()`."""
    stored = layer.statistics
    if stored is None:
        return batch()
    if not isinstance(stored, Placeholder):
        return stored
    if _reports.get() is None:
        if _found.get() is not None:
            return batch()  # which says what is wrong with a call outside of `predict`
        message = f"`{type(layer).__name__}` has no statistics of the support set."
        received = "a layer that the loss of the support examples does not use"
        expected = "a loss that uses the same layers for support and query examples"
        raise ValueError(explain(message, received, expected))
    trace, reports = _reports.get()
    if trace != get_opaque_trace_state(convention="eqxmeta"):
        raise _out_of_reach(f"`{type(layer).__name__}` was called", "the model")
    if stored.index in reports:
        raise _used_twice("within one call of the model")
    reports[stored.index] = batch()
    return reports[stored.index]


class Placeholder(eqx.Module):
    """Stands for the statistics that are looked for. It is part of the model's structure, and so
    survives whatever a loss does to the model before it calls it."""

    index: int = eqx.field(static=True)


# While statistics are looked for: the trace in which `run` was called, and those found so far;
# within `predict`: the trace of the mapped function, and those of this call.
_found: contextvars.ContextVar[Any] = contextvars.ContextVar("found", default=None)
_reports: contextvars.ContextVar[Any] = contextvars.ContextVar("reports", default=None)
# Within `predict` with weights: the trace of the mapped function, and the example's weight.
_weight: contextvars.ContextVar[Any] = contextvars.ContextVar("weight", default=None)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _map_layers(fun: Callable[[SupportLayer], SupportLayer], model: PyTree) -> PyTree:
    def is_layer(x: Any) -> bool:
        return isinstance(x, SupportLayer)

    return jax.tree.map(lambda x: fun(x) if is_layer(x) else x, model, is_leaf=is_layer)


def _with(layer: SupportLayer, statistics: PyTree) -> SupportLayer:
    return eqx.tree_at(lambda x: x.statistics, layer, statistics, is_leaf=lambda x: x is None)


def _out_of_reach(what: str, whose: str) -> ValueError:
    message = "The statistics of the support set cannot be taken out of a transformation."
    received = f"{what} inside of a `jit`, `checkpoint`, `vmap` or loop of {whose}'s own"
    expected = "the call outside of it: strategies compile the loss as a part of the whole"
    return ValueError(explain(message, received, expected))


def _used_twice(how: str) -> ValueError:
    message, received = "A layer has two sets of support statistics.", f"one layer used twice {how}"
    expected = "a layer for each use, and one prediction of the support set in the loss"
    return ValueError(explain(message, received, expected))
