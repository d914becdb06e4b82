"""Task batches that the host reads ahead of the device."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._errors import add_note, explain
from .device_source import Loaded, check_task
from .task import Task, layout_of

# Steps of host data that travel to the device together. More of them hide the cost of a
# dispatch, which stops mattering long before they fill the memory.
_MAX_STEPS = 64
_MAX_BYTES = 64 * 2**20


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
            message = "`tasks` is too short."
            expected = f"`tasks[step]` for steps 0 to {steps - 1}"
            raise ValueError(explain(message, f"{length} batches", expected))
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
        expected = "a batch of tasks for every outer step"
        try:
            batch = self._source[step]
        except (IndexError, KeyError, StopIteration) as error:
            message = f"`tasks[{step}]` does not exist."
            raise ValueError(explain(message, repr(error), expected)) from error
        except Exception as error:  # the user's own: only where it is from is added
            received = f"tasks of type {type(self._source).__name__}"
            add_note(error, f"This error came out of `tasks[{step}]`.", received, expected)
            raise
        check_task(batch, f"tasks[{step}]", leading="task")
        batch = jax.tree.map(np.array, batch)  # copied: a source may refill its buffers
        strange = {x.dtype for x in jax.tree.leaves(batch) if not _has_jax(x.dtype)}
        if strange:
            message = f"`tasks[{step}]` has arrays that JAX cannot hold."
            received = f"dtype {', '.join(map(str, strange))}"
            raise TypeError(explain(message, received, "arrays of numbers"))
        if like is None:
            sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch)})
            if sizes != [self._meta_batch_size]:
                message = f"`tasks[{step}]` has a wrong number of tasks."
                expected = f"meta_batch_size={self._meta_batch_size}"
                raise ValueError(explain(message, ", ".join(map(str, sizes)), expected))
        elif layout_of(batch) != layout_of(like):
            message = f"`tasks[{step}]` differs from the first batch in shape or dtype."
            raise ValueError(explain(message, layout_of(batch), str(layout_of(like))))
        return batch


def _has_jax(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc" or dtype.isbuiltin == 2  # bfloat16 and its kin
