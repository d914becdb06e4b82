"""How the tasks of an outer step are laid out: all at once, or a few at a time."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_int
from .._errors import explain
from .._jaxpr.flops import flops_of
from .mesh import divide, mean_over_devices, mesh_of_tasks, platform
from .task import Task, count_tasks

TaskChunk: TypeAlias = int | Literal["auto"] | None

# `over(one)` is `one(task, key)` for every task, results stacked along a leading task axis.
OverTasks: TypeAlias = Callable[[Callable[[Task, Any], PyTree]], PyTree]

# Operations of one task, loops counted once. On a CPU the kernels of a larger task fill caches and
# cores by themselves, and what it costs to launch them does not show; of smaller ones it does.
# Measured by `benchmarks/layout.py`.
_LARGE_TASK = 100_000_000


def check_task_chunk(task_chunk: Any, argument: str) -> None:
    if task_chunk is None or (isinstance(task_chunk, str) and task_chunk == "auto"):
        return
    what = "tasks at a time, None (all) or 'auto'"
    check_int(task_chunk, argument, minimum=1, what=what)
    if not isinstance(task_chunk, int):  # kept as it is, and NumPy's are arrays to `filter_jit`
        expected = f"an integer of Python's own, {what}"
        raise TypeError(explain(f"`{argument}` is NumPy's.", repr(task_chunk), expected))


def is_large(closed: ClosedJaxpr, tasks: int = 1) -> bool:
    """Whether tasks, of which `closed` computes so many, are better done one after another."""
    return platform() == "cpu" and flops_of(closed, loops=False) > tasks * _LARGE_TASK


def in_chunks(
    fun: Callable[[OverTasks], PyTree],
    tasks: Task,
    key: PRNGKeyArray | None,
    task_chunk: TaskChunk,
) -> PyTree:
    """The mean over all tasks of what `fun(over)` computes as a mean over the tasks of `over`.

    With `task_chunk=c` chunks of `c` tasks (if that does not divide the number of tasks, of the
    largest number below that does) go through `fun` one after another, in a scan that adds up the
    results: memory is that of `c` tasks, also of what `fun` differentiates. Of results that are
    not floating point, such as counters, those of the last chunk are returned.

    Where a mesh of devices is set (`over_devices`) each computes its part of the tasks in this way.
    """
    total = count_tasks(tasks)
    # Of all tasks together, so that a task is the same on any number of devices.
    keys = None if key is None else jax.random.split(key, total)
    mesh = mesh_of_tasks()
    if mesh is None or total % mesh.size != 0:
        return _in_chunks(fun, (tasks, keys), task_chunk)

    def part(batch: tuple[Task, Any], shared: None) -> PyTree:
        return mean_over_devices(_in_chunks(fun, batch, task_chunk))

    return divide(part, mesh, results="agree")((tasks, keys), None)


def _in_chunks(
    fun: Callable[[OverTasks], PyTree], batch: tuple[Task, Any], task_chunk: TaskChunk
) -> PyTree:
    total = count_tasks(batch[0])
    size, shapes = total if task_chunk is None else task_chunk, None
    if size == "auto":
        size = total
        if total > 1 and platform() == "cpu":
            # Traced once: counted, and then, unless a task is large, computed as it is.
            closed, shapes = jax.make_jaxpr(lambda: fun(_over(batch)), return_shape=True)()
            if not is_large(closed, total):
                return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())
            size = 1
    if size >= total:
        return fun(_over(batch))

    # Chunks of one size, so that there is one program for all of them and no memory for another.
    size = max(n for n in range(1, size + 1) if total % n == 0)

    def accumulate(sums: PyTree, chunk: tuple[Task, Any]) -> tuple[PyTree, None]:
        share = size / total
        new = fun(_over(chunk))
        return jax.tree.map(lambda s, x: s + share * x if _adds(s) else x, sums, new), None

    chunks = jax.tree.map(lambda x: x.reshape(total // size, size, *x.shape[1:]), batch)
    if shapes is None:
        first = jax.tree.map(lambda x: x[:size], batch)
        shapes = jax.eval_shape(lambda: fun(_over(first)))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(x.dtype)), shapes)
    sums, _ = jax.lax.scan(accumulate, sums, chunks)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), sums, shapes)


def _over(batch: tuple[Task, Any]) -> OverTasks:
    tasks, keys = batch

    def over(one: Callable[[Task, Any], PyTree]) -> PyTree:
        # An estimator may want several values of the same tasks, with the same dropout. To JAX's
        # checker of keys a clone is one that may be used once more.
        again = tasks, None if keys is None else jax.random.clone(keys)
        if count_tasks(tasks) > 1:
            return jax.vmap(one)(*again)
        # Without the axis: a convolution whose weights have one is another, slower, operation.
        alone = jax.tree.map(lambda x: x[0], again)
        return jax.tree.map(lambda x: x[None], one(*alone))

    return over


def _adds(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def sum_dtype(dtype: Any) -> Any:
    """In which numbers of `dtype` are added up: in half precision a sum loses the small ones."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype
