"""Which part of a model is its head, and strategies that adapt it apart from the body."""

import abc
import dataclasses
import inspect
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from .._arguments import check_argument
from .._errors import annotate_errors, explain, has_no_such_part
from .._meta_gradient.inner_loop import InnerLoop
from .._meta_gradient.select import select
from .._types import Loss
from .gradient_strategy import GradientStrategy
from .rollout_strategy import ByInnerLoop
from .strategy import Where

_A_HEAD = "a function from the model to its head, such as `head=lambda m: m.layers[-1]`"


class Head(eqx.Module):
    """What adapts in ANIL: `where(model)`. `None`: the field or property `head` of the model or,
    if it has none, the last `eqx.nn.Linear` in it. Raises `ValueError` if there is neither."""

    where: Where | None
    argument: str

    def __call__(self, model: PyTree) -> PyTree:
        if self.where is not None:
            received = f"a `{type(model).__name__}`"
            with annotate_errors(f"`{self.argument}`", received, _A_HEAD, seen=has_no_such_part):
                return self.where(model)
        if _has_head(model):
            return model.head
        layers = [x for x in jax.tree.leaves(model, is_leaf=_is_linear) if _is_linear(x)]
        if not layers:
            message = f"`{self.argument}` is needed: the model does not say what its head is."
            name = type(model).__name__
            received = f"`{name}`, without a field `head` and without `eqx.nn.Linear`"
            raise ValueError(explain(message, received, _A_HEAD))
        return layers[-1]


class Body(eqx.Module):
    """What adapts in BOIL: everything but the head."""

    head: Head

    @property
    def argument(self) -> str:
        return self.head.argument

    def __call__(self, model: PyTree) -> PyTree:
        _, others = select(model, self.head, self.argument)
        if not jax.tree.leaves(eqx.filter(others, eqx.is_inexact_array)):
            message = f"`{self.argument}` leaves nothing that adapts."
            received = "a head that holds every floating-point array of the model"
            raise ValueError(explain(message, received, "a head beside which there is a body"))
        return others


class AdaptsByHead(GradientStrategy, ByInnerLoop):
    """MAML in which a part of the model adapts that is known by its head: `chosen(head)`."""

    loss: Loss
    inner: InnerLoop
    optimizer: optax.GradientTransformation
    head: Where | None = eqx.field(default=None, kw_only=True)

    def __post_init__(self):
        name, head = type(self).__name__, self.head
        argument = f"{name}(head=...)"
        sound = callable(head) and not isinstance(head, type | eqx.Module)
        check_argument(head is None or sound, head, argument, f"{_A_HEAD}, or None", TypeError)
        self.inner = adapting(self.inner, self.chosen(Head(self.head, argument)), argument)

    @staticmethod
    @abc.abstractmethod
    def chosen(head: Head) -> Where:
        """From the model to what adapts."""


def adapting(inner: Any, adapt: Where, argument: str) -> Any:
    """The same inner loop, in which `adapt` is what adapts: the strategy's own `argument`."""
    if not isinstance(inner, InnerLoop):  # refused by `__check_init__`
        return inner
    if inner.adapt is not None:
        strategy, _, _ = argument.partition("(")
        message = f"`{strategy}(inner=...)` says itself what adapts."
        received = f"`InnerLoop(adapt={inner.adapt!r})`"
        expected = f"an `InnerLoop` without `adapt`, and `{argument}`; or `MAML`, which takes any "
        raise ValueError(explain(message, received, expected + "`adapt`"))
    return dataclasses.replace(inner, adapt=adapt)


def _has_head(model: PyTree) -> bool:
    # Not a method of that name: bound, it holds the whole model.
    fields = getattr(type(model), "__dataclass_fields__", {})
    computed = isinstance(inspect.getattr_static(type(model), "head", None), property)
    return "head" in fields or "head" in getattr(model, "__dict__", {}) or computed


def _is_linear(x: Any) -> bool:
    return isinstance(x, eqx.nn.Linear)
