"""Task batches that the host reads ahead of the device."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import add_note, explain
from .device_source import Loaded, check_task
from .task import Task

# Steps of host data that travel to the device together. More of them hide the cost of a
# dispatch, which stops mattering long before they fill the memory.
_MAX_STEPS = 64
_MAX_BYTES = 64 * 2**20


class HostSource:
    """Reads `source[step]`, `step = start, start + 1, ...`, on a thread ahead of the device.

    `source[step]` is a batch of tasks in NumPy, `Task` with leading axes [tasks, examples]; the
    same for the same step, so that a resumed run sees what an uninterrupted one would have.

    `check` is given the shapes of a task, with values where there are labels, and raises
    `ValueError` if these are none of the model's: once to begin with, and for labels beyond those
    that it has seen.
    """

    def __init__(
        self,
        source: Any,
        *,
        start: int,
        steps: int,
        meta_batch_size: int,
        check: Callable[[Task], object],
    ):
        self._source = source
        self._check = check
        self._known: list[tuple[int, int]] | None = None
        self._compared: dict[int, bool] = {}
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
        self._check_labels(start, self._first, _label_ranges(self._first))
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

    def _one(self, batch: Task, task: int) -> Task:
        """The shapes of a task of `batch`, with its values where there are labels."""

        def of_task(shape: jax.ShapeDtypeStruct, x: np.ndarray) -> Any:
            if _is_labels(x):
                return jnp.asarray(x[task])
            return jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)

        return jax.tree.map(of_task, self.example, batch)

    def _is_compared(self, batch: Task, index: int) -> bool:
        """Whether the check minds the values of labels `index`. Other integers (numbers of
        examples, times) may grow from batch to batch, and each look at them is a trace."""
        if index not in self._compared:
            leaves, structure = jax.tree.flatten(self._one(batch, 0))
            where = [i for i, x in enumerate(jax.tree.leaves(batch)) if _is_labels(x)][index]
            most = jnp.iinfo(leaves[where].dtype).max
            leaves[where] = jnp.full_like(leaves[where], most)
            try:
                self._check(jax.tree.unflatten(structure, leaves))
            except ValueError:
                self._compared[index] = True
            else:
                self._compared[index] = False
        return self._compared[index]

    def _check_labels(self, step: int, batch: Task, ranges: list[tuple[int, int]]) -> None:
        if self._known is None:
            tasks, known = {0}, [(1, 0)] * len(ranges)
        else:
            tasks, known = set(), self._known
        labels = [x for x in jax.tree.leaves(batch) if _is_labels(x)]
        for i, x in enumerate(labels):
            (low, high), (least, most) = ranges[i], known[i]
            wider = least > most or low < least or high > most
            if wider and (self._known is None or self._is_compared(batch, i)):
                tasks |= {int(x.min(axis=1).argmin()), int(x.max(axis=1).argmax())}
        for task in sorted(tasks):
            try:
                self._check(self._one(batch, task))
            except ValueError as error:
                if self._known is not None:
                    error.add_note(f"These are the labels of `tasks[{step}]`.")
                raise
        if tasks:
            self._known = [
                (min(low, least), max(high, most)) if least <= most else (low, high)
                for (low, high), (least, most) in zip(ranges, known, strict=True)
            ]

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
            step, batch, ranges = item
            # Here and not on the thread: it traces, for which JAX has settings by thread.
            self._check_labels(step, batch, ranges)
            batches.append(batch)
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
            yield start, self._first, self._known
            for step in range(start + 1, steps):
                batch = self._read(step, self._first)
                yield step, batch, _label_ranges(batch)
        except GeneratorExit:
            return
        except BaseException as error:
            yield error

    def _read(self, step: int, like: Task | None) -> Task:
        expected = "a batch of tasks for every outer step"
        try:
            batch = self._source[step]
        except (IndexError, KeyError, StopIteration) as error:
            raise ValueError(
                explain(f"`tasks[{step}]` does not exist.", repr(error), expected)
            ) from error
        except Exception as error:  # the user's own: only where it is from is added
            received = f"tasks of type {type(self._source).__name__}"
            add_note(error, f"This error came out of `tasks[{step}]`.", received, expected)
            raise
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


def _is_labels(x: np.ndarray) -> bool:
    return x.ndim == 2 and x.dtype.kind in "iu" and x.size > 0


def _label_ranges(batch: Task) -> list[tuple[int, int]]:
    return [(int(x.min()), int(x.max())) for x in jax.tree.leaves(batch) if _is_labels(x)]


def _has_jax(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc" or dtype.isbuiltin == 2  # bfloat16 and its kin


def _layout(task: Task) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(task)
    return {jax.tree_util.keystr(path): f"{x.dtype.name}{list(x.shape)}" for path, x in leaves}
