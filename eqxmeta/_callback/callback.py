"""What a callback is. Concrete callbacks live in `eqxmeta.callbacks`."""

import contextlib
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import explain
from .published import Published
from .run import Run


class Callback:
    """Base of all callbacks: a plain host object with hooks, none of which need be filled in.

    - `every`: `on_step_end` is called at the absolute outer steps that are multiples of it; the
      compiled loop stops there. `None`: the callback needs no such stop.
    - `name`: the key of the callback's state in a checkpoint, unique in a trainer. `None`: the
      name of the class.
    - `last`: run the hooks after those of all callbacks that do not say so. `Checkpoint` does,
      so that what the others did at a step is part of what it saves.
    - `writes`: the callback leaves files behind; `Trainer(fast_dev_run=...)` leaves it out.
    - `logs`: all names under which it logs numbers and curves, if they are known before the first
      step; then a monitor of another name can be refused.
    """

    every: int | None = None
    name: str | None = None
    last: bool = False
    writes: bool = False
    logs: Collection[str] | None = None

    def exclusive(self) -> AbstractContextManager[object]:
        """Entered before `fit` reads any file, and left however it ends: for what nobody else may
        touch meanwhile. Entering it raises if somebody else does."""
        return contextlib.nullcontext()

    def refuse(self, run: Run) -> None:
        """Raise if the run must not start, because its files would be somebody else's. Every
        callback is asked before any does anything, and none may leave a trace here."""

    def check_monitor(self, metrics: Collection[str], logged: Collection[str] | None) -> None:
        """Raise if a name that this callback waits for is neither among those of the training
        metrics nor among those that callbacks log (`None`: not known)."""

    def on_fit_start(self, run: Run) -> None:
        """Before the first step. `run.step` is not 0 if the run was resumed."""

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        """After each dispatch of the compiled loop: every metric of the strategy, a row per
        outer step. `metrics["step"]` holds the absolute steps (1 is the first)."""

    def on_step_end(self, run: Run) -> None:
        """At absolute multiples of `every`, after `on_chunk_end` has seen the step's row."""

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        """When a callback logs something with `run.log`."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """When training ends by an error, before it reaches the caller of `fit`. Not called if
        `on_fit_start` was not."""

    def on_fit_end(self, run: Run) -> None:
        """After the last step: also after a stop request, the time limit, or Ctrl-C. What it raises
        reaches the caller of `fit` once all callbacks have been called."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: JSON values only. Called when a checkpoint is written, so
        whatever the callback has buffered up to this step must reach its file here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called before `on_fit_start`."""

    def resume_paths(self) -> Sequence[Path]:
        """Checkpoints from which `fit(resume="auto")` may continue, the newest first."""
        return ()


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def name_of(callback: Callback) -> str:
    return type(callback).__name__ if callback.name is None else callback.name


def attach(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """The callbacks in the order in which their hooks run.

    Raises `TypeError` for what is not a callback or has a hook of a wrong name or signature,
    `ValueError` for two of the same name or a wrong `every`.
    """
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            explain("`callbacks` is not a list.", repr(callbacks), "a list of callbacks, or `[]`")
        )
    callbacks = tuple(callbacks)
    names: dict[str, Callback] = {}
    for position, callback in enumerate(callbacks):
        where = f"`callbacks[{position}]`"
        if not isinstance(callback, Callback):
            instance = (
                "an instance" if not isinstance(callback, type) else "an instance, not the class"
            )
            raise TypeError(
                explain(
                    f"{where} is not a callback.",
                    repr(callback),
                    f"{instance} of `eqxmeta.callbacks.Callback`",
                )
            )
        _check_hooks(callback, where)
        _check_every(callback, where)
        name = name_of(callback)
        if not isinstance(name, str) or not name:
            raise TypeError(explain(f"{where}.name is invalid.", repr(name), "a name, or None"))
        if name in names:
            raise ValueError(
                explain(
                    f"{where} has the name of an earlier callback.",
                    f"{name!r} twice",
                    "unique names, under which states are stored: set `.name` on one",
                )
            )
        names[name] = callback
    return tuple(sorted(callbacks, key=lambda c: c.last))


def _check_hooks(callback: Callback, where: str) -> None:
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in HOOKS:
            raise TypeError(
                explain(
                    f"{where} has a hook that does not exist.",
                    f"`{type(callback).__name__}.{name}`",
                    f"one of {', '.join(('refuse', *HOOKS))}",
                )
            )
    for name in HOOKS:
        wanted = len(inspect.signature(getattr(Callback, name)).parameters) - 1
        hook = getattr(callback, name)
        if not callable(hook):
            raise TypeError(
                explain(f"{where} has a hook that is not a method.", f"{name}={hook!r}", "a method")
            )
        try:
            inspect.signature(hook).bind(*[None] * wanted)
        except TypeError as error:
            expected = f"`{name}{inspect.signature(getattr(Callback, name))}`"
            raise TypeError(
                explain(
                    f"{where} has a hook of a wrong signature.",
                    f"`{name}{inspect.signature(hook)}`",
                    expected,
                )
            ) from error


def _check_every(callback: Callback, where: str) -> None:
    every = callback.every
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(
            explain(
                f"{where}.every is invalid.",
                repr(every),
                "a positive number of outer steps, or None",
            )
        )
    if (
        every is None
        and type(callback).on_step_end is not Callback.on_step_end
        and "every" not in vars(callback)
    ):
        raise ValueError(
            explain(
                f"{where} has `on_step_end` but never says when.",
                "every=None",
                "`every`: call it at multiples of that many outer steps",
            )
        )
