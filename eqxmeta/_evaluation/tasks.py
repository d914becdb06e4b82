"""The tasks of an evaluation: drawn, given, or read from the host, a piece at a time."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._arguments import check_argument, check_int
from .._task.device_source import check_device_source, check_task, is_device_source, sample
from .._task.host_source import read_batch
from .._task.task import Task, check_batch, count_tasks

# Small tasks evaluated in parallel, and the most that are dispatched at once.
PARALLEL = 50

# How many numbers of an array tell tasks apart.
_TELLING = 1024


def check_tasks(tasks: Any, num_tasks: Any, caller: str) -> tuple[Task, int]:
    """The shapes of one of the tasks to evaluate on, and how many these are: of a batch all that it
    has. Raises `TypeError` or `ValueError`."""
    argument = f"{caller}(tasks=...)"
    if isinstance(tasks, Task):
        check_task(tasks, argument, leading="task")
        check_batch(tasks, argument)
        return _one_of(tasks), count_tasks(tasks)
    if is_device_source(tasks):
        task, batch = check_device_source(tasks, argument), None
    else:
        sound, fault = hasattr(tasks, "__getitem__"), "is not a task source"
        expected = "an `eqx.Module` with `sample(key) -> Task`, a batch of tasks, or a host "
        expected += "source, `tasks[i] -> batch`"
        check_argument(sound, tasks, argument, expected, TypeError, fault)
        batch = read_batch(tasks, 0, None, argument)
        task = _one_of(batch)
    num_tasks = check_int(num_tasks, f"{caller}(num_tasks=...)", minimum=1, what="tasks")
    if batch is not None and hasattr(tasks, "__len__"):
        there = len(tasks) * count_tasks(batch)
        expected, fault = f"{there} or less: so many has `tasks`", "is too large"
        check_argument(
            num_tasks <= there, num_tasks, f"{caller}(num_tasks=...)", expected, fault=fault
        )
    return task, num_tasks


def _one_of(batch: Task) -> Task:
    return jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x)[0], batch))


def pieces(tasks: Any, num_tasks: int, argument: str) -> Iterator[tuple[Any, int, int]]:
    """`num_tasks` tasks, in pieces of one size, for which one program is enough: of each what holds
    its tasks, the number of its first one, and its size. The last may go beyond `num_tasks`."""
    if not isinstance(tasks, Task) and not is_device_source(tasks):
        first, begin, step = None, 0, 0
        while begin < num_tasks:
            batch = read_batch(tasks, step, first, argument)
            size, first = count_tasks(batch), first or batch
            yield jax.device_put(batch), begin, size
            begin, step = begin + size, step + 1
        return
    size = math.ceil(num_tasks / math.ceil(num_tasks / PARALLEL))
    for begin in range(0, num_tasks, size):
        rows = np.minimum(np.arange(begin, begin + size), num_tasks - 1)
        yield (_take(tasks, rows) if isinstance(tasks, Task) else tasks), begin, size


def _take(batch: Task, rows: np.ndarray) -> Task:
    return jax.tree.map(lambda x: x[rows], batch)


def task_and_key(
    tasks: Any, root: PRNGKeyArray, begin: Array, index: Array
) -> tuple[Task, PRNGKeyArray, PRNGKeyArray]:
    """Task `index` of a piece of which the first is number `begin`; the key it is drawn from, and
    the key for adapting to it."""
    task_key, key = jax.random.split(jax.random.fold_in(root, begin + index))
    if isinstance(tasks, Task):
        return jax.tree.map(lambda x: x[index], tasks), task_key, key
    return sample(tasks, task_key), task_key, key


def telling_number(task: Task) -> Float[Array, ""]:
    """A number by which tasks are told apart: the same, to rounding, for the same task, whoever
    computes it. A sum, weighted by place, over some of the numbers in each of its arrays."""
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(task):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        x = leaf.ravel()[:: -(-leaf.size // _TELLING) or 1]
        x = (jnp.abs(x) if jnp.iscomplexobj(x) else x).astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0)  # what is padding may be anything
        total += jnp.sum(x * jnp.cos(jnp.arange(1, x.size + 1, dtype=jnp.float32)))
    return total


def same_tasks(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two evaluations, of which these are the `telling_number`s, were on the same tasks."""
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.std(a)))
