"""Checks of arguments that many public names share. Each raises before anything is traced."""

import optax

from ._errors import explain


def check_int(value: object, argument: str, *, minimum: int, what: str) -> None:
    """`TypeError` unless `value` is an integer, `ValueError` if it is below `minimum`."""
    expected = f"an integer, {minimum} or more {what}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(explain(f"`{argument}` is not an integer.", repr(value), expected))
    if value < minimum:
        raise ValueError(explain(f"`{argument}` is too small.", repr(value), expected))


def check_seed(value: object, argument: str) -> None:
    """A seed is an integer that every platform's generator takes; a key is not a seed."""
    expected = "an integer from 0 to 2**32 - 1"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(explain(f"`{argument}` is not a seed.", repr(value), expected))
    if not 0 <= value < 2**32:
        raise ValueError(explain(f"`{argument}` is out of range.", repr(value), expected))


def check_optimizer(optimizer: object, argument: str) -> None:
    """An optax optimizer is meant: a class, a learning rate or a strategy is not one."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            explain(
                f"`{argument}` is not an optimizer.",
                repr(optimizer),
                "an `optax.GradientTransformation`, for example `optax.sgd(0.01)`",
            )
        )
