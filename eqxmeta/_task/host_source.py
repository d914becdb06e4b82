"""Task batches that the host reads ahead of the device."""

import threading
from collections import deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._errors import add_note, explain
from .._files.patience import hurried
from .device_source import Loaded, check_task
from .mesh import divided
from .task import Task, count_tasks, layout_of

# Steps of host data that travel to the device together. More of them hide the cost of a
# dispatch, which stops mattering long before they fill the memory.
_MAX_STEPS = 64
_MAX_BYTES = 64 * 2**20

# For how many seconds the end of a run waits for the batch that is being read.
_LAST_READ = 1.0


class HostSource:
    """Reads `source[step]`, `step = start, start + 1, ...`, on a thread ahead of the device.

    `source[step]` is a batch of tasks in NumPy, `Task` with leading axes [tasks, examples]; the
    same for the same step, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(
        self,
        source: Any,
        *,
        start: int,
        steps: int,
        meta_batch_size: int,
        mesh: Mesh | None = None,
    ):
        self._source = source
        self._mesh = mesh
        self._meta_batch_size = meta_batch_size
        length = len(source) if hasattr(source, "__len__") else None
        if length is not None and length < steps:
            message = "`tasks` is too short."
            expected = f"`tasks[step]` for steps 0 to {steps - 1}"
            raise ValueError(explain(message, f"{length} batches", expected))
        self._batches: deque[Task] = deque()
        self._error: BaseException | None = None  # in the place of the batch after these
        self._changed = threading.Condition()  # for all of these
        self._stop = False
        self.capacity = 1  # until the size of a batch is known
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
        try:
            # On the thread, as all others: it may hang, and whoever waits can be interrupted.
            while not self.available(1, 0.1):
                pass
            self._first = self._peek()
        except BaseException:
            self.__exit__()
            raise
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._first))
        with self._changed:
            self.capacity = max(1, min(_MAX_STEPS, _MAX_BYTES // max(size, 1)))
            self._changed.notify_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """The thread may be in the source, which may hang: it is a daemon, and left to itself."""
        with self._changed:
            self._stop = True
            self._batches.clear()
            self._changed.notify_all()
        self._thread.join(_LAST_READ if not hurried() else _LAST_READ / 10)

    def available(self, steps: int, seconds: float) -> int:
        """The number of batches that `take` has at once, `steps` at most: known once that many are
        there, or after so many seconds. An error counts as one, if no batch is before it."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._batches) >= steps or self._error, seconds)
            return min(steps, len(self._batches)) or int(self._error is not None)

    def take(self, steps: int) -> Loaded:
        """The batches of the next `steps` outer steps, padded to the one compiled size. They are
        `available`."""
        batches = []
        for _ in range(steps):
            batches.append(self._peek())
            with self._changed:
                self._batches.popleft()
                self._changed.notify_all()
        padding = [self._first] * (self.capacity - steps)
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches, *padding)
        placed = divided(stacked, self._mesh, axis=1)  # the first axis is that of steps
        return Loaded(jax.device_put(placed) if self._mesh is None else placed)

    def _peek(self) -> Task:
        if not self._batches and self._error is not None:
            raise self._error
        return self._batches[0]

    def _work(self, start: int, steps: int) -> None:
        first = None
        try:
            for step in range(start, steps):
                batch = self._read(step, first)
                first = first or batch
                with self._changed:
                    self._changed.wait_for(self._has_room)
                    if self._stop:
                        return
                    self._batches.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # it goes to the main thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._stop or len(self._batches) < 2 * self.capacity

    def _read(self, step: int, like: Task | None) -> Task:
        batch = read_batch(self._source, step, like, "tasks", adapts=False)
        if like is None and (tasks := count_tasks(batch)) != self._meta_batch_size:
            message = f"`tasks[{step}]` has a wrong number of tasks."
            expected = f"meta_batch_size={self._meta_batch_size}"
            raise ValueError(explain(message, tasks, expected))
        return batch


def read_batch(
    source: Any, step: int, like: Task | None, argument: str, *, adapts: bool = True
) -> Task:
    """A copy of `source[step]`, a batch of tasks as NumPy arrays: of the shapes and dtypes of
    `like`, if it is not the first. `adapts`: see `check_device_source`.

    Raises `TypeError` or `ValueError` for what is no such batch, naming `argument`; and what the
    source raises, with a note of where that is from.
    """
    name = f"{argument}[{step}]"
    try:
        batch = source[step]
    except (IndexError, KeyError, StopIteration) as error:
        message, expected = f"`{name}` does not exist.", "a batch of tasks for every step"
        raise ValueError(explain(message, repr(error), expected)) from error
    except Exception as error:  # the user's own: only where it is from is added
        received = f"tasks of type {type(source).__name__}"
        expected = "a batch of tasks for every step"
        add_note(error, f"This error came out of `{name}`.", received, expected)
        raise
    check_task(batch, name, leading="task", adapts=adapts)
    batch = jax.tree.map(np.array, batch)  # copied: a source may refill its buffers
    strange = {x.dtype for x in jax.tree.leaves(batch) if not _has_jax(x.dtype)}
    if strange:
        message = f"`{name}` has arrays that JAX cannot hold."
        received = f"dtype {', '.join(map(str, strange))}"
        raise TypeError(explain(message, received, "arrays of numbers"))
    if like is None:
        sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch)})
        if len(sizes) != 1:
            message = f"`{name}` has different numbers of tasks in its arrays."
            raise ValueError(explain(message, ", ".join(map(str, sizes)), "one number of tasks"))
    elif layout_of(batch) != layout_of(like):
        message = f"`{name}` differs from the first batch in shape or dtype."
        raise ValueError(explain(message, layout_of(batch), str(layout_of(like))))
    return batch


def _has_jax(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc" or dtype.isbuiltin == 2  # bfloat16 and its kin
