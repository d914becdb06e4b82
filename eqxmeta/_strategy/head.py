"""Which part of a model is its head, for strategies that treat it apart from the body."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._errors import annotate_errors, explain
from .._meta_gradient.inner_loop import InnerLoop
from .._meta_gradient.select import select

Where: TypeAlias = Callable[[Any], PyTree]


class Head(eqx.Module):
    """What adapts in ANIL: `where(model)`. `None`: the field or property `head` of the model or,
    if it has none, the last `eqx.nn.Linear` in it. Raises `ValueError` if there is neither."""

    where: Where | None
    argument: str

    def __call__(self, model: PyTree) -> PyTree:
        if self.where is not None:
            expected = "a function from the model to its head, such as `lambda m: m.layers[-1]`"
            with annotate_errors(f"`{self.argument}`", f"a `{type(model).__name__}`", expected):
                return self.where(model)
        if _has_head(model):
            return model.head
        layers = [x for x in jax.tree.leaves(model, is_leaf=_is_linear) if _is_linear(x)]
        if not layers:
            raise ValueError(
                explain(
                    f"`{self.argument}` is needed: the model does not say what its head is.",
                    f"`{type(model).__name__}`, without a field `head` and without `eqx.nn.Linear`",
                    "a function from the model to its head, such as `head=lambda m: m.layers[-1]`",
                )
            )
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
            raise ValueError(
                explain(
                    f"`{self.argument}` leaves nothing that adapts.",
                    "a head that holds every floating-point array of the model",
                    "a head beside which the model has a body",
                )
            )
        return others


def adapting(inner: Any, adapt: Where, strategy: str) -> Any:
    """The same inner loop, in which `adapt` is what adapts."""
    if not isinstance(inner, InnerLoop):  # refused by `__check_init__`
        return inner
    if inner.adapt is not None:
        raise ValueError(
            explain(
                f"`{strategy}(inner=...)` says itself what adapts.",
                f"`InnerLoop(adapt={inner.adapt!r})`",
                f"an `InnerLoop` without `adapt`, and `{strategy}(head=...)`; or `MAML`, which "
                "takes any `adapt`",
            )
        )
    return InnerLoop(inner.optimizer, inner.steps, inner.gradient, adapt=adapt, remat=inner.remat)


def check_head(head: Any, argument: str) -> None:
    if head is not None and (not callable(head) or isinstance(head, type | eqx.Module)):
        raise TypeError(
            explain(
                f"`{argument}` is not a function.",
                repr(head)[:200],
                "a function from the model to its head, such as `lambda m: m.layers[-1]`, or None",
            )
        )


def _has_head(model: PyTree) -> bool:
    # Not a method of that name: bound, it holds the whole model.
    fields = getattr(type(model), "__dataclass_fields__", {})
    computed = isinstance(inspect.getattr_static(type(model), "head", None), property)
    return "head" in fields or "head" in getattr(model, "__dict__", {}) or computed


def _is_linear(x: Any) -> bool:
    return isinstance(x, eqx.nn.Linear)
