"""Tasks of several sources."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import explain
from .._task.device_source import check_device_source
from .._task.task import Task, layout_of


class Union(eqx.Module):
    """Tasks of several sources: each task is one of a source that is drawn at random.

        Union(Episodes(*omniglot, 5, 1, 15), Episodes(*doodles, 5, 1, 15), weights=[3, 1])

    As in Meta-Dataset (Triantafillou et al. 2020, arXiv 1903.03096), section 3.2, where an episode
    is of one data set. All in one program: every source samples, and one of the tasks is taken.

    - `sources`: two or more, each with `sample(key) -> Task` of the same shapes and dtypes.
    - `weights`: how often each is drawn, relative to the others. `None`: all equally often.

    Raises `TypeError` or `ValueError` for what is no such source, for tasks that differ (naming the
    arrays), and for weights that are not one finite number, 0 or more, for each source.
    """

    sources: tuple[Any, ...]
    weights: Float[Array, " sources"]

    def __init__(self, *sources: Any, weights: Sequence[float | int] | None = None):
        if len(sources) < 2:
            expected = "two or more: `Union(source, another, weights=[3, 1])`"
            raise ValueError(explain("`Union` is of too few sources.", len(sources), expected))
        self.sources = sources
        self.weights = jnp.asarray(_checked_weights(weights, len(sources)), float)
        arguments = [f"Union(sources[{i}])" for i in range(len(sources))]
        tasks = [
            check_device_source(source, argument, adapts=False)
            for source, argument in zip(sources, arguments, strict=True)
        ]
        for task, argument in zip(tasks[1:], arguments[1:], strict=True):
            _check_alike(tasks[0], task, argument)

    def sample(self, key: PRNGKeyArray) -> Task:
        """A task of one of the sources. Pure, for use inside `jit`, `vmap` and loops."""
        which, key = jax.random.split(key)
        number = jax.random.categorical(which, jnp.log(self.weights))
        # A method is hashed, for which all fields are needed.
        branches = [lambda key, source=source: source.sample(key) for source in self.sources]
        return jax.lax.switch(number, branches, key)


def _checked_weights(weights: Any, sources: int) -> np.ndarray:
    expected = f"{sources} finite numbers, 0 or more, of which one is not 0; or None"
    try:
        given = np.ones(sources) if weights is None else np.asarray(weights, float)
    except (TypeError, ValueError):
        raise TypeError(explain("`weights` are not numbers.", weights, expected)) from None
    if given.shape != (sources,) or not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(explain("`weights` are invalid.", weights, expected))
    if not given.any():
        raise ValueError(explain("`weights` are all zero.", weights, expected))
    return given


def _check_alike(first: Task, task: Task, argument: str) -> None:
    before, after = layout_of(first), layout_of(task)
    if before != after or jax.tree.structure(first) != jax.tree.structure(task):
        paths = [p for p in {**before, **after} if before.get(p) != after.get(p)]
        differs = [f"{p.lstrip('.')}: {before.get(p)}, {after.get(p)}" for p in paths]
        received = "; ".join(differs) or f"{jax.tree.structure(first)}, {jax.tree.structure(task)}"
        message = f"The tasks of `Union(sources[0])` and `{argument}` differ."
        raise ValueError(explain(message, received, "the same shapes and dtypes in all"))
