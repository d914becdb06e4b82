"""What holds a model and more, and is no model itself."""

from typing import Any, NoReturn

import equinox as eqx

from .._errors import explain


class HoldsModel(eqx.Module):
    """Has a field `model`, and others beside it. A call is refused, which says so wherever it is
    taken for a model: by a user, a loss, another strategy."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise not_a_model(self, "a call of it")


def not_a_model(holder: Any, received: str) -> TypeError:
    name, fields = type(holder).__name__, ", ".join(getattr(holder, "__dataclass_fields__", {}))
    return TypeError(
        explain(
            f"A `{name}` is not a model: it holds one, in its field `model`.",
            f"{received}, with fields {fields}",
            f"the model in it, `.model` of the `{name}`; or, adapted to a task, what `inner_adapt` "
            "of its strategy returns",
        )
    )
