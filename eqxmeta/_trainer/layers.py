"""The layers of a model, as a table: shapes, parameters, and which of them adapt and are learnt."""

import contextlib
import dataclasses
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._arguments import check_argument
from .._errors import annotate_errors
from .._model.check import check_model, count_parameters
from .._model.predict import predict
from .._model.state import MetaParameters, own_model
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy
from .._table import Table
from .._task.task import shapes_of
from .start import initial_state
from .summary import fast_part


@dataclass(frozen=True)
class Layer:
    """A row of `Summary`.

    - `path`, `kind`: where in the model it is, and its class.
    - `shape`: of what it makes of one example; `None` if that cannot be seen.
    - `parameters`, `adapts`, `learnt`: how many there are, adapt in a task, and are meta-learnt.
    """

    path: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    adapts: int
    learnt: int


@dataclass(frozen=True, repr=False)
class Summary(Table):
    """`layers`, in the order in which the model holds them. Print it."""

    layers: tuple[Layer, ...]

    def cells(self) -> list[list[str]]:
        def part(some: int, of: int) -> str:
            return "yes" if some == of else f"{some:,}" if some else "no"

        lines = [["layer", "class", "output", "parameters", "adapts", "learnt"]]
        for x in self.layers:
            shape = "" if x.shape is None else str(list(x.shape))
            shares = part(x.adapts, x.parameters), part(x.learnt, x.parameters)
            lines.append([x.path, x.kind, shape, f"{x.parameters:,}", *shares])
        return lines

    def note(self) -> str:
        total, adapt, learnt = (
            sum(getattr(x, name) for x in self.layers)
            for name in ("parameters", "adapts", "learnt")
        )
        return f"{total:,} parameters: {adapt:,} adapt, {learnt:,} are learnt."


def summary(model: PyTree, strategy: Strategy, example: PyTree) -> Summary:
    """The layers of `model` as a table: output shape, parameters, whether they adapt in a task and
    whether they are meta-learnt; and what `strategy` learns beside the model.

        print(em.summary(model, strategy, images[0]))

    - `example`: one input, as the model takes it. Only its shape and dtype count.

    Raises `ValueError` or `TypeError` for invalid arguments, and what the model raises.
    """
    check_model(model, "summary(model=...)")
    sound, argument = isinstance(strategy, Strategy), "summary(strategy=...)"
    check_argument(sound, strategy, argument, "an instance of `Strategy`", TypeError)
    state = initial_state(strategy, model, "summary(model=...)")
    shapes = _output_shapes(model, example)
    adapting = _adapting(strategy, model, state.model)
    learnt = strategy.learnt(state.model)
    rows = _rows(own_model(state.model), adapting, own_model(learnt), shapes)
    if isinstance(state.model, MetaParameters):
        extra = eqx.filter(state.model.extra, eqx.is_inexact_array)
        count = count_parameters(extra)
        rows.append(Layer("(extra)", type(state.model.extra).__name__, None, count, 0, count))
    return Summary(tuple(rows))


def _is_layer(x: Any) -> bool:
    """A module without another one in it."""
    if not isinstance(x, eqx.Module):
        return False
    inner = jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, eqx.Module) and y is not x)
    return not any(isinstance(y, eqx.Module) for y in inner)


def _rows(
    model: PyTree, adapting: PyTree, learnt: PyTree, shapes: dict[str, tuple[int, ...]]
) -> list[Layer]:
    def count(layer: PyTree, mask: PyTree) -> int:
        return count_parameters(eqx.filter(layer, mask))

    rows = []
    paths = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_layer)
    adapt, learn = (
        jax.tree.structure(model, is_leaf=_is_layer).flatten_up_to(mask)
        for mask in (adapting, learnt)
    )
    for (path, layer), a, b in zip(paths, adapt, learn, strict=True):
        if not (total := count_parameters(layer)):
            continue
        name = jax.tree_util.keystr(path).removeprefix(".")
        kind = type(layer).__name__ if isinstance(layer, eqx.Module) else "array"
        rows.append(
            Layer(
                name or "(model)", kind, shapes.get(name), total, count(layer, a), count(layer, b)
            )
        )
    return rows


def _adapting(strategy: Strategy, model: PyTree, meta_model: PyTree) -> PyTree:
    """A tree of bools like the user's own model."""
    own, fast = own_model(meta_model), None
    if isinstance(strategy, RolloutStrategy):
        fast = fast_part(strategy.inner, own, model, meta_model)
    if fast is None:
        return jax.tree.map(lambda x: False, own)
    return jax.tree.map(lambda x: x is not None, own_model(fast), is_leaf=lambda x: x is None)


def _watched(layer: Any, tell: Callable[[Any, bool], None]) -> Any:
    """`layer`, telling the shape of what it returns. Its class is a subclass, so that whoever asks
    what it is gets the same answer."""
    cls: Any = type(layer)

    def __call__(self: Any, *args: Any, **options: Any) -> Any:
        out = cls.__call__(self, *args, **options)
        tell(out, False)
        return out

    def channels_last(self: Any, *args: Any, **options: Any) -> Any:  # what our backbones call
        out = cls.channels_last(self, *args, **options)
        tell(out, True)
        return out

    methods: dict[str, Any] = {"__call__": __call__}
    if hasattr(cls, "channels_last"):
        methods["channels_last"] = channels_last
    kind: Any = types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(methods))
    new = object.__new__(kind)
    for field in dataclasses.fields(cls):
        if hasattr(layer, field.name):
            object.__setattr__(new, field.name, getattr(layer, field.name))
    return new


def _output_shapes(model: PyTree, example: PyTree) -> dict[str, tuple[int, ...]]:
    """By key path, of each layer that was seen to be called."""
    found: dict[str, tuple[int, ...]] = {}

    def watch(path: Any, x: Any) -> Any:
        if not path or not _is_layer(x) or not callable(x):
            return x
        name = jax.tree_util.keystr(path).removeprefix(".")

        def tell(out: Any, channels_last: bool) -> None:
            if hasattr(out, "shape"):
                moved = channels_last and len(out.shape) > 1
                found[name] = (out.shape[-1], *out.shape[:-1]) if moved else out.shape

        return _watched(x, tell)

    def run(model: PyTree) -> Any:
        model = eqx.nn.inference_mode(model)
        alone = jax.tree.map(lambda x: jnp.zeros((1, *jnp.shape(x)), jnp.result_type(x)), example)
        return jax.eval_shape(lambda x: predict(model, x), alone)

    with annotate_errors("the model, called with `summary(example=...)`", shapes_of(example)):
        out = run(model)
    with contextlib.suppress(
        Exception
    ):  # one that looks at what its layers are, beside what they do
        run(jax.tree_util.tree_map_with_path(watch, model, is_leaf=_is_layer))
    if hasattr(out, "shape"):
        found[""] = out.shape[1:]
    return found
