"""The callbacks of a run, and the order in which their hooks are called."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from .._callback.callback import Callback, name_of
from .._callback.published import AT_END, Published, check_logged
from .._callback.run import Run
from .._strategy.metrics import SKIPPED
from .signals import Overdue, Signals
from .speaker import say


class Hooks:
    """Calls the hooks of `callbacks`, and sees to it that none misses what the others were told.

    - `everys`: by the name of a callback, the steps at whose multiples `on_step_end` is called.
    - `metrics`: the names of the training metrics, under which nothing else may be logged.
    - `signals`: they interrupt a hook that takes too long once the run is to end.
    """

    def __init__(
        self,
        callbacks: tuple[Callback, ...],
        everys: Mapping[str, int],
        metrics: Collection[str],
        signals: Signals,
    ):
        self._signals = signals
        self._callbacks = callbacks
        self._everys = everys
        self._reserved = {*metrics, "step", SKIPPED, AT_END}
        self._begun: list[Callback] = []  # whose `on_fit_start` has come to its end
        self._held_back: list[Mapping[str, Published]] | None = None

    def states(self) -> dict[str, dict[str, Any]]:
        states = {}
        for callback in self._callbacks:
            with self._signals.within(callback.grace):
                states[name_of(callback)] = callback.state_dict()
        return states

    def sync(self) -> None:
        for callback in self._callbacks:
            callback.sync_files()

    def load_states(self, states: Mapping[str, dict[str, Any]]) -> None:
        for callback in self._callbacks:
            if name_of(callback) in states:
                callback.load_state_dict(states[name_of(callback)])

    def refuse(self, run: Run) -> None:
        for callback in self._callbacks:
            callback.refuse(run)

    def begin(self, run: Run) -> None:
        def begin(callback: Callback) -> None:
            # One that fails has nothing yet to put in order, and would fail over that again.
            if self._call(run, callback, "on_fit_start"):
                self._begun.append(callback)

        self._tell_all(run, begin)

    def notify_rows(self, run: Run, rows: Mapping[str, np.ndarray]) -> None:
        """The metrics of a chunk, a row for each of its outer steps."""
        self._tell_all(run, lambda callback: self._call(run, callback, "on_chunk_end", rows))

    def log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        check_logged(scalars, self._reserved)
        if self._held_back is not None:
            self._held_back.append(scalars)
            return
        for callback in self._callbacks:
            self._call(run, callback, "on_log", scalars)

    def step_end(self, run: Run) -> None:
        for callback in self._callbacks:
            every = self._everys.get(name_of(callback))
            if every is not None and run.step % every == 0:
                self._call(run, callback, "on_step_end")

    def end(self, run: Run) -> None:
        """Calls every callback, since `Checkpoint` is the last; then raises the first error."""
        run.ended = True
        first = None
        for hook in ("secure", "on_fit_end"):
            for callback in self._callbacks:
                try:
                    self._call(run, callback, hook)
                except Exception as error:
                    if first is None:
                        first = error
                    elif error is not first:
                        first.add_note(f"{name_of(callback)}.{hook} failed as well: {error!r}")
        if first is not None:
            raise first

    def exception(self, run: Run, error: BaseException) -> None:
        """Every callback that has begun hears of the error; one that fails over it, or is
        interrupted, does not silence the rest."""
        interrupt = None
        for callback in self._begun:
            try:
                self._call(run, callback, "on_exception", error)
            except BaseException as second:
                error.add_note(f"{name_of(callback)}.on_exception failed as well: {second!r}")
                if not isinstance(second, Exception):
                    interrupt = second
        if interrupt is not None:
            raise interrupt from error

    def _call(self, run: Run, callback: Callback, hook: str, *arguments: object) -> bool:
        """Calls a hook; whether it came to its end. Once the run is to end, one that takes too long
        is interrupted, so that the others can save what there is."""
        where = f"{name_of(callback)}.{hook}"
        try:
            with run.doing(where, tell=False), self._signals.within(callback.grace):
                getattr(callback, hook)(run, *arguments)
        except Overdue:
            say(f"{where} was left: it took longer than `grace` allows once the run was to end.")
            return False
        return True

    def _tell_all(self, run: Run, hook: Callable[[Callback], object]) -> None:
        """Calls `hook` of every callback, also after Ctrl-C in one of them, which is then raised.
        What one logs meanwhile reaches the others when they have been told as much."""
        interrupt = None
        self._held_back = []
        try:
            for callback in self._callbacks:
                try:
                    hook(callback)
                except KeyboardInterrupt as error:
                    interrupt = error
        finally:
            published, self._held_back = self._held_back, None
        for scalars in published:
            self.log(run, scalars)
        if interrupt is not None:
            raise interrupt
