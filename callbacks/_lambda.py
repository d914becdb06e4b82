"""A callback made of functions."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eqxmeta._arguments import check_int_or_none
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.published import Published
from eqxmeta._callback.run import Run
from eqxmeta._errors import explain


class Lambda(Callback):
    """A callback from functions, for the few lines that are not worth a class.

        Lambda(every=1000, on_step_end=lambda run: print(run.step))

    Each function takes the arguments of the hook that it is named for (see `Callback`).
    `on_step_end` needs `every`, and nothing else does.

    Raises `ValueError` for no function at all and for one of `every` and `on_step_end` without the
    other. `Trainer` raises `TypeError` for what is not a function or has other arguments.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        name: str | None = None,
        on_fit_start: Callable[[Run], Any] | None = None,
        on_chunk_end: Callable[[Run, Mapping[str, np.ndarray]], Any] | None = None,
        on_step_end: Callable[[Run], Any] | None = None,
        on_log: Callable[[Run, Mapping[str, Published]], Any] | None = None,
        on_exception: Callable[[Run, BaseException], Any] | None = None,
        on_fit_end: Callable[[Run], Any] | None = None,
    ):
        hooks = {
            "on_fit_start": on_fit_start,
            "on_chunk_end": on_chunk_end,
            "on_step_end": on_step_end,
            "on_log": on_log,
            "on_exception": on_exception,
            "on_fit_end": on_fit_end,
        }
        hooks = {hook: function for hook, function in hooks.items() if function is not None}
        if not hooks:
            raise ValueError(explain("`Lambda()` does nothing.", "no function", "one or more"))
        if (every is None) != (on_step_end is None):
            message = "`Lambda` has one of `every` and `on_step_end` without the other."
            received = f"every={every}, on_step_end={on_step_end}"
            expected = "both: `on_step_end` is called at multiples of `every` outer steps"
            raise ValueError(explain(message, received, expected))
        self.every = check_int_or_none(every, "Lambda(every=...)", minimum=1, what="outer steps")
        self.name = name
        # In the place of the methods, so that their signatures are checked as those are.
        for hook, function in hooks.items():
            setattr(self, hook, function)
