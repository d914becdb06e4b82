"""How many outer steps go into one dispatch."""

from collections.abc import Iterable
from typing import Literal

from .chunk import CAPACITY

# Long enough that the cost of a dispatch does not show, short enough that the progress bar
# moves and Ctrl-C is answered.
_TARGET_SECONDS = 0.5


def next_stop(step: int, steps: int, everys: Iterable[int]) -> int:
    """The first step after `step` at which somebody needs the host."""
    return min([steps, *((step // every + 1) * every for every in everys)])


class Pace:
    """How many steps to put into one dispatch: `"auto"` aims at half a second.

    What is measured is from one chunk's end, as the host saw it, to the next one's. A hook that
    takes longer than the chunk that runs meanwhile is counted as if that had: chunks are then
    shorter than they might be. `capacity`: the most steps that the source of tasks has for one.
    """

    def __init__(self, steps_per_execution: int | Literal["auto"], capacity: int | None = None):
        self._auto = steps_per_execution == "auto"
        self._capacity = CAPACITY if capacity is None else min(capacity, CAPACITY)
        self._limit = 1 if steps_per_execution == "auto" else int(steps_per_execution)

    @property
    def limit(self) -> int:
        return min(self._limit, self._capacity)

    def measured(self, steps: int, seconds: float) -> None:
        if self._auto:
            # At most four times as long as what was measured: the first, short chunks mislead.
            wanted = int(_TARGET_SECONDS * steps / max(seconds, 1e-6))
            self._limit = max(1, min(wanted, 4 * max(steps, self._limit // 4)))
