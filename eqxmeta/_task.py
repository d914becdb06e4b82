import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._errors import explain


class Task(eqx.Module):
    """One few-shot task, or a batch of them.

    Each field is a pytree of arrays that lead with the example axis: `(x, y)` for the built-in
    losses, with `x: [examples, ...]` and `y: [examples, ...]`. A batch of tasks has one more
    leading axis, the task axis: `x: [tasks, examples, ...]`.
    """

    support: PyTree
    query: PyTree

    @property
    def pooled(self) -> PyTree:
        """Support and query examples together, for algorithms that do not split a task."""
        support, query = jax.tree.structure(self.support), jax.tree.structure(self.query)
        if support != query:
            raise ValueError(
                explain(
                    "`task.support` and `task.query` cannot be pooled.",
                    f"support {support}, query {query}",
                    "the same pytree structure in both",
                )
            )
        return jax.tree.map(lambda s, q: jnp.concatenate([s, q]), self.support, self.query)


def count_tasks(tasks: Task) -> int:
    """The number of tasks of a batch."""
    return jax.tree.leaves(tasks)[0].shape[0]
