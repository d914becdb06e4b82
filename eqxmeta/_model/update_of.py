"""One call for every optimizer, whether or not it looks at the value that is descended."""

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, PyTree

from .._errors import explain


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
