"""Types that users' code meets."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray

# Python's; or, where a program is given it, such as that of `fit_grid`, a scalar that JAX traces.
Number: TypeAlias = float | Float[Array, ""]

Metrics: TypeAlias = dict[str, Float[Array, ""]]


@runtime_checkable
class Loss(Protocol):
    """What a model is trained to make small, on one task's examples: any such function.

    `loss(model, batch, key)` returns the mean over examples, a scalar, and a dict of further
    scalars to report, which may be empty. `batch` is a task's `support` or `query`; `key` is for
    dropout and the like, and `None` where predictions are to be deterministic. Parameters are
    passed by position, so their names are free.
    """

    def __call__(
        self, model: Any, batch: Any, key: PRNGKeyArray | None, /
    ) -> tuple[Float[Array, ""], Metrics]: ...
