"""A few-shot task, or a batch of them."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._errors import explain


class Task(eqx.Module):
    """One few-shot task, or a batch of them.

    Each field is a pytree of arrays that lead with the example axis: `(x, y)` for the built-in
    losses, with `x: [examples, ...]` and `y: [examples, ...]`. A batch of tasks has one more
    leading axis, the task axis: `x: [tasks, examples, ...]`.

    Where sets differ in size the field is `(x, y, weight)` with `weight: [examples]`, floating:
    padding has weight 0 and label 0, see `eqxmeta.losses.examples`.

    For a loss of your own a field may be anything that it takes: examples without labels, or beside
    them arrays of the task as a whole, without an example axis (a goal, a key). The first array
    that has an axis says how many examples there are; arrays whose first axis is another have none.
    If a field begins with a key, as `(key, goal)`, there are no examples: it is one whole.

    `support=()` is none: `query` is then an ordinary minibatch, for strategies that train on such
    (`eqxmeta.Baseline`).
    """

    support: PyTree
    query: PyTree

    @property
    def pooled(self) -> PyTree:
        """Support and query examples together, for algorithms that do not split a task. Arrays
        without an example axis are those of the support set."""
        support, query = jax.tree.structure(self.support), jax.tree.structure(self.query)
        if support != query:
            message = "`task.support` and `task.query` cannot be pooled."
            expected = "the same pytree structure in both"
            raise ValueError(explain(message, f"support {support}, query {query}", expected))
        counts = count_examples(self.support), count_examples(self.query)

        def pool(*arrays: Any) -> Any:
            lead = all(x.shape[:1] == (n,) for x, n in zip(arrays, counts, strict=True))
            return jnp.concatenate(arrays) if lead else arrays[0]

        return jax.tree.map(pool, self.support, self.query)


def count_examples(examples: PyTree) -> int | None:
    """How many examples there are in a support or query set; `None` if it is none of examples."""
    return next((x.shape[0] for x in _arrays(examples) if x.ndim > 0), None)


def count_all_examples(tasks: Task) -> int:
    """How many examples there are in a batch of tasks, those of its support and query sets."""
    sets = (_arrays(part) for part in (tasks.support, tasks.query))
    return sum(next((math.prod(x.shape[:2]) for x in part if x.ndim > 1), 0) for part in sets)


def _arrays(part: PyTree) -> list[Any]:
    """Those that may be of examples: none, of a set that is drawn from a key."""
    leaves = jax.tree.leaves(part)
    drawn = leaves and jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key)
    return [] if drawn else leaves


def take_examples(examples: PyTree, rows: Any) -> PyTree:
    """Those at `rows`, with the arrays that have no example axis."""
    total = count_examples(examples)
    return jax.tree.map(lambda x: x[rows] if x.shape[:1] == (total,) else x, examples)


def shapes_of(tree: PyTree) -> str:
    """`(float32[4,3], int32[4])`"""

    def show(x: Any) -> Any:
        return f"{x.dtype.name}[{','.join(map(str, x.shape))}]" if hasattr(x, "dtype") else x

    return str(jax.tree.map(show, tree)).replace("'", "")


def layout_of(tree: PyTree) -> dict[str, str]:
    """`{".weight": "float32[4, 3]"}`: of every array, by its key path."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype.name}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "dtype") and hasattr(x, "shape")
    }


def label_ranges(tasks: Task, name: str, *, ndim: int) -> str:
    """ "`task.support[1]` from 0 to 4": of what may be labels, integers with `ndim` axes."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tasks))
    return ", ".join(
        f"`{name}{jax.tree_util.keystr(path)}` from {x.min()} to {x.max()}"
        for path, x in leaves
        if jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == ndim and x.size
    )


def check_batch(tasks: Any, argument: str) -> None:
    """Raises `TypeError` or `ValueError` if `tasks` are not a batch of tasks."""
    expected = (
        "an `eqxmeta.Task` whose arrays have a leading task axis and then, if of examples, the "
        "example axis, `x: [tasks, examples, ...]`"
    )
    message = f"`{argument}` is not a batch of tasks."
    if not isinstance(tasks, Task):
        raise TypeError(explain(message, type(tasks).__name__, expected))
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tasks)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(explain(message, f"arrays of shapes {shapes}", expected))


def count_tasks(tasks: Task) -> int:
    """The number of tasks of a batch."""
    return jax.tree.leaves(tasks)[0].shape[0]
