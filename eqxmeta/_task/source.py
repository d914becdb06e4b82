"""What `fit(tasks=...)` was given, opened: batches of tasks for any number of outer steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jax.sharding import Mesh

from .._arguments import check_argument
from .device_source import Loaded, Sampled, check_device_source, is_device_source
from .host_source import HostSource
from .mesh import replicated
from .task import Task


class Source(NamedTuple):
    """Tasks for the outer steps of a run, in order.

    - `take(steps)`: what a dispatch of the next `steps` outer steps reads.
    - `available(steps, seconds)`: for how many of the next `steps` outer steps `take` would not
      wait; it is all of them, or so many seconds have passed.
    - `example`: the shapes of a batch.
    - `capacity`: the most steps that `take` can serve; `None`: any number.
    """

    take: Callable[[int], Sampled | Loaded]
    available: Callable[[int, float], int]
    example: Task
    capacity: int | None


@contextmanager
def open_source(
    tasks: Any,
    meta_batch_size: int,
    argument: str,
    *,
    start: int = 0,
    steps: int,
    mesh: Mesh | None = None,
) -> Iterator[Source]:
    """Batches of `meta_batch_size` tasks for outer steps `start` to `steps`, on the devices of
    `mesh`.

    Raises `TypeError` or `ValueError` for what is not a source of tasks, naming `argument`.
    """
    if is_device_source(tasks):
        check_device_source(tasks, argument, adapts=False)
        sampled = replicated(Sampled(tasks, meta_batch_size), mesh)
        yield Source(lambda steps: sampled, lambda steps, seconds: steps, sampled.example, None)
    else:
        sound, fault = hasattr(tasks, "__getitem__"), "is not a task source"
        expected = "an `eqx.Module` with `sample(key) -> Task`, or `tasks[step] -> batch`"
        check_argument(sound, tasks, argument, expected, TypeError, fault)
        start = min(start, steps - 1)
        options = {"start": start, "steps": steps, "meta_batch_size": meta_batch_size}
        with HostSource(tasks, **options, mesh=mesh) as host:
            yield Source(host.take, host.available, host.example, host.capacity)
