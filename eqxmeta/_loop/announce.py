"""What is said of a signal, and of what takes its time."""

import signal
from collections.abc import Callable
from typing import TypeAlias

from .._files.patience import hurried
from .speaker import say

# What is done, since when (`time.monotonic()`), and whether to tell of it by a line.
Activity: TypeAlias = tuple[str, float, bool] | None
# Shows a text, or none, in a bar.
Show: TypeAlias = Callable[[str | None], None] | None

# Seconds after which a line tells of it; then every minute.
_TOLD_AFTER = (10.0, 30.0)


def announcement(number: int, activity: Activity, *, again: bool, begun: bool) -> str:
    """What happens now that signal `number` has come."""
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    now = f" (now: {activity[0]})" if activity else ""
    if again:
        return f"{name} again: the run ends at once{now}."
    if not begun:
        return f"{name}: the run ends{now}. It had taken no step, and nothing is lost."
    then = "Then the process ends" if number == signal.SIGTERM else "Again: it ends at once"
    return f"{name}: the run ends after what is under way{now}, with all it reached. {then}."


class Clock:
    """Shows for how long something has been going on: in a bar, or else, if it is to `talk`, by a
    line now and then."""

    def __init__(self, *, talk: bool):
        self._talk = talk
        self._begun = self._told = 0.0  # when the activity began, and how long ago it was told of
        self._shown = False

    def tick(self, now: float, activity: Activity, show: Show) -> None:
        """To be called a few times a second; `now` is of `time.monotonic()`."""
        seconds = now - activity[1] if activity else 0.0
        if show is not None:
            if activity and seconds > 1:
                show(f"{activity[0]} {_minutes(seconds)}")
            elif self._shown:
                show(None)
            self._shown = seconds > 1
        elif activity and self._talk and (activity[2] or hurried()):
            if activity[1] != self._begun:
                self._begun, self._told = activity[1], 0.0
            after = [*_TOLD_AFTER, self._told - self._told % 60 + 60]
            wait = next(second for second in after if second > self._told)
            if seconds >= wait:
                say(f"{activity[0]} {_minutes(seconds)}")
                self._told = wait


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
