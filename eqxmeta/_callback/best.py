"""The values with which a run was saved, and which of them are the best."""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from .monitor import Monitor
from .run import Run

# An outer step, and the monitored value there.
Value: TypeAlias = tuple[int, float]


class Best:
    """What `Checkpoint` knows of the value that it monitors.

    - `saved`: the `keep` best of the saves at multiples of `every`, of which the files are written,
      the best first; of equals the first.
    - `last`: that of the end of a run that took all its steps. It counts until the run goes on.
    - `newest`: the newest value, saved or not.
    - `others`: the steps that were the best by what the run monitored before it was resumed.
    """

    def __init__(self, monitor: Monitor, every: int, keep: int = 1):
        self._monitor = monitor
        self._every = every
        self._keep = keep
        self.forget()

    def forget(self) -> None:
        self.saved: tuple[Value, ...] = ()
        self.last: Value | None = None
        self.newest: Value | None = None
        self.others: set[int] = set()
        self._counts = True  # whether the newest may be the best

    def observe(self, step: int, values: Mapping[str, Any], *, ended: bool = False) -> None:
        value = self._monitor.find(values)
        if value is not None:
            self.newest = step, value
            self._counts = step % self._every == 0 and not ended

    def at(self, step: int) -> Value | None:
        return self.newest if self.newest is not None and self.newest[0] == step else None

    def once_saved(self, step: int) -> tuple[Value, ...]:
        """What `saved` becomes with the file of `step`."""
        new = self.at(step)
        if not new or not self._counts or not self._monitor.improves(new[1], None):
            return self.saved
        # Those that are no worse stay before it.
        place = sum(not self._monitor.improves(new[1], old) for _, old in self.saved)
        return (*self.saved[:place], new, *self.saved[place:])[: self._keep]

    def end(self, run: Run, saved: Collection[int]) -> bool:
        """After the last step; whether any save had a value."""
        new = self.at(run.step) if run.step in saved else None
        sound = new is not None and self._monitor.improves(new[1], None)
        if sound and run.step == run.steps:
            self.last = new
        return sound or self.step is not None

    @property
    def step(self) -> int | None:
        best = self.saved[0] if self.saved else None
        if self.last and self._monitor.improves(self.last[1], best and best[1]):
            best = self.last
        return best and best[0]

    def state_dict(self) -> dict[str, Any]:
        (step, value), *behind = self.saved or ((None, None),)
        state = self._watched() | {"best_step": step, "best_value": value}
        more = {"behind": {str(s): x for s, x in behind}, "others": sorted(self.others)}
        return state | {name: x for name, x in more.items() if x}

    def _watched(self) -> dict[str, Any]:
        return {"monitor": self._monitor.name, "mode": self._monitor.mode}

    def restore(self, state: Mapping[str, Any], run: Run, saved: Collection[int]) -> None:
        """What another monitor has seen counts for nothing, but its best stays; nor does a file
        that has gone."""
        behind = state.get("behind", {})
        told = [(state.get("best_step"), state.get("best_value"))]
        told += [(s, x) for name, x in behind.items() for s in saved if str(s) == name]
        self.others = {s for s in saved if s in state.get("others", ())}
        if any(state.get(name) != now for name, now in self._watched().items()):
            self.others.update(s for s in saved if s in [step for step, _ in told])
            return
        there = [(s, x) for s, x in told if s is not None and s in saved and x is not None]
        self.saved = tuple(there[: self._keep])
        newest = run.resumed_meta.get("monitored") or {}
        ended = run.start == run.steps and run.start in saved
        if ended and newest.get("name") == self._monitor.name and newest.get("value") is not None:
            self.last = run.start, newest["value"]

    def told(self, step: int) -> dict[str, Any] | None:
        """What the file of `step` says of its value."""
        if self._monitor.name is None:
            return None
        new = self.at(step)
        value, at_end = (new[1], not self._counts) if new else (None, False)
        watched = {"name": self._monitor.name, "mode": self._monitor.mode}
        return watched | {"value": value, "at_end": at_end}
