"""Where the tasks of an outer step come from: sampled on the device, or read by the host."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ._errors import explain, tracing
from ._flops import count_flops
from ._task import Task

# What sources are asked for: `body(step, tasks, key, carry)` for every outer step of a range, with
# `key_of(step)`.
KeyOf: TypeAlias = Callable[[Any], PRNGKeyArray]
Body: TypeAlias = Callable[[Any, Task, PRNGKeyArray, PyTree], PyTree]

# Steps of host data that travel to the device together. More of them hide the cost of a
# dispatch, which stops mattering long before they fill the memory.
_MAX_STEPS = 64
_MAX_BYTES = 64 * 2**20


# The tasks of several outer steps are drawn at once: a few large kernels in the place of many small
# ones, of which hashing keys alone takes a good part of a step on a small model. But not so many
# that they fill the caches, or that it matters if a chunk ends before they are used up.
_MAX_BLOCK = 32
_BLOCK_BYTES = 2**18
_BLOCK_FLOPS = 2**22


class Sampled(eqx.Module):
    """Tasks sampled inside the compiled loop, for `block` outer steps at a time."""

    tasks: Any
    meta_batch_size: int
    block: int

    def __init__(self, tasks: Any, meta_batch_size: int):
        self.tasks = tasks
        self.meta_batch_size = meta_batch_size
        batch = eqx.filter_eval_shape(self.first, jax.random.key(0))
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch))
        flops = count_flops(self.first, jax.random.key(0))
        fits = min(_BLOCK_BYTES // max(size, 1), _BLOCK_FLOPS // max(flops, 1))
        self.block = max(1, min(_MAX_BLOCK, fits))

    def first(self, key: PRNGKeyArray) -> Task:
        """The tasks of an outer step whose key is `key`."""
        return jax.vmap(self.tasks.sample)(jax.random.split(key, self.meta_batch_size))

    def for_each_step(self, start: Any, stop: Any, key_of: KeyOf, body: Body, carry: PyTree):
        # Blocks begin at multiples of their length, wherever the chunk does: a task is computed by
        # the same instructions, to the same bits, however the steps are cut.
        def block(number: Any, carry: PyTree) -> PyTree:
            begin = number * self.block
            keys = jax.vmap(key_of)(begin + jnp.arange(self.block))
            drawn = jax.vmap(self.first)(keys), keys

            def step(index: Any, carry: PyTree) -> PyTree:
                tasks, key = jax.tree.map(lambda x: x[index - begin], drawn)
                return body(index, tasks, key, carry)

            first, last = jnp.maximum(start, begin), jnp.minimum(stop, begin + self.block)
            return jax.lax.fori_loop(first, last, step, carry)

        return jax.lax.fori_loop(start // self.block, -(-stop // self.block), block, carry)


class Loaded(eqx.Module):
    """Batches of tasks from the host, for up to as many steps as the leading axis is long."""

    batches: PyTree

    def first(self, key: PRNGKeyArray) -> Task:
        return jax.tree.map(lambda x: x[0], self.batches)

    def for_each_step(self, start: Any, stop: Any, key_of: KeyOf, body: Body, carry: PyTree):
        def step(index: Any, carry: PyTree) -> PyTree:
            tasks = jax.tree.map(lambda x: x[index - start], self.batches)
            return body(index, tasks, key_of(index), carry)

        return jax.lax.fori_loop(start, stop, step, carry)


def is_device_source(tasks: object) -> bool:
    return hasattr(tasks, "sample")


def check_device_source(tasks: Any, argument: str) -> Task:
    """The shapes of one sampled task. Raises `TypeError` or `ValueError`; compiles nothing."""
    if isinstance(tasks, type) or not isinstance(tasks, eqx.Module) or not is_device_source(tasks):
        raise TypeError(
            explain(
                f"`{argument}` is not a task source.",
                repr(tasks)[:200],
                "an `eqx.Module` with `sample(key) -> Task`, such as `eqxmeta.tasks.Sinusoid(...)`",
            )
        )
    with tracing(f"`{argument}.sample(key)`", f"a key, and {repr(tasks)[:200]}"):
        task = eqx.filter_eval_shape(lambda t: t.sample(jax.random.key(0)), tasks)
    check_task(task, f"{argument}.sample(key)")
    return task


def check_task(task: Any, argument: str, *, leading: str = "example") -> None:
    if not isinstance(task, Task):
        raise TypeError(
            explain(f"`{argument}` is not a task.", type(task).__name__, "an `eqxmeta.Task`")
        )
    for name, field in (("support", task.support), ("query", task.query)):
        leaves = jax.tree.leaves(field)
        if not leaves:
            raise ValueError(
                explain(
                    f"`{argument}` has no {name} set.",
                    repr(field),
                    "a pytree of arrays, such as (x, y)",
                )
            )
        sizes = {getattr(leaf, "shape", ())[:1] for leaf in leaves}
        if len(sizes) != 1 or () in sizes or (0,) in sizes:
            raise ValueError(
                explain(
                    f"`{argument}.{name}` does not lead with one {leading} axis.",
                    f"shapes {[tuple(getattr(leaf, 'shape', ())) for leaf in leaves]}",
                    f"the same leading {leading} axis, 1 or longer, in every array",
                )
            )


class HostSource:
    """Reads `source[step]`, `step = start, start + 1, ...`, on a thread ahead of the device.

    `source[step]` is a batch of tasks in NumPy, `Task` with leading axes [tasks, examples]; the
    same for the same step, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, source: Any, *, start: int, steps: int, meta_batch_size: int):
        self._source = source
        self._meta_batch_size = meta_batch_size
        length = len(source) if hasattr(source, "__len__") else None
        if length is not None and length < steps:
            raise ValueError(
                explain(
                    "`tasks` is too short.",
                    f"{length} batches",
                    f"`tasks[step]` for steps 0 to {steps - 1}",
                )
            )
        self._first = self._read(start, None)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._first))
        self.capacity = max(1, min(_MAX_STEPS, _MAX_BYTES // max(size, 1)))
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2 * self.capacity)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(start, steps), name="eqxmeta-host-source", daemon=True
        )

    @property
    def example(self) -> Task:
        """The shapes of a batch, with the dtypes that it has on the device."""

        def on_device(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

        return jax.tree.map(on_device, self._first)

    @property
    def one(self) -> Task:
        """The shapes of a task, with values where there are labels: one integer an example."""

        def first(shape: jax.ShapeDtypeStruct, x: np.ndarray) -> Any:
            if x.ndim == 2 and x.dtype.kind in "iu":
                return jnp.asarray(x[0])
            return jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)

        return jax.tree.map(first, self.example, self._first)

    def __enter__(self) -> "HostSource":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def take(self, steps: int) -> Loaded:
        """The batches of the next `steps` outer steps, padded to the one compiled size."""
        batches = []
        for _ in range(steps):
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            batches.append(item)
        padding = [self._first] * (self.capacity - steps)
        return Loaded(jax.device_put(jax.tree.map(lambda *xs: np.stack(xs), *batches, *padding)))

    def _work(self, start: int, steps: int) -> None:
        for item in self._items(start, steps):
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def _items(self, start: int, steps: int) -> Iterator[Any]:
        # An error goes to the main thread in the place of the batch that it stands for.
        try:
            yield self._first
            for step in range(start + 1, steps):
                yield self._read(step, self._first)
        except GeneratorExit:
            return
        except BaseException as error:
            yield error

    def _read(self, step: int, like: Task | None) -> Task:
        try:
            batch = self._source[step]
        except (IndexError, KeyError, StopIteration) as error:
            raise ValueError(
                explain(
                    f"`tasks[{step}]` does not exist.",
                    repr(error),
                    "a batch of tasks for every outer step",
                )
            ) from error
        check_task(batch, f"tasks[{step}]", leading="task")
        batch = jax.tree.map(np.array, batch)  # copied: a source may refill its buffers
        strange = {x.dtype for x in jax.tree.leaves(batch) if not _has_jax(x.dtype)}
        if strange:
            raise TypeError(
                explain(
                    f"`tasks[{step}]` has arrays that JAX cannot hold.",
                    f"dtype {', '.join(map(str, strange))}",
                    "arrays of numbers",
                )
            )
        if like is None:
            sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch)})
            if sizes != [self._meta_batch_size]:
                raise ValueError(
                    explain(
                        f"`tasks[{step}]` has a wrong number of tasks.",
                        ", ".join(map(str, sizes)),
                        f"meta_batch_size={self._meta_batch_size}",
                    )
                )
        elif _layout(batch) != _layout(like):
            raise ValueError(
                explain(
                    f"`tasks[{step}]` differs from the first batch in shape or dtype.",
                    _layout(batch),
                    str(_layout(like)),
                )
            )
        return batch


def _has_jax(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc" or dtype.isbuiltin == 2  # bfloat16 and its kin


def _layout(task: Task) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(task)
    return {jax.tree_util.keystr(path): f"{x.dtype.name}{list(x.shape)}" for path, x in leaves}
