"""What a callback is. Concrete callbacks live in `eqxmeta.callbacks`."""

import contextlib
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .._arguments import check_argument, check_int_or_none
from .._direction import Mode
from .._errors import explain
from .published import Published
from .run import Run


@dataclass(frozen=True)
class KnownNames:
    """What is known before the first step of the values that there will be.

    - `metrics`: the names of the training metrics.
    - `logged`: the names under which callbacks log numbers and curves; `None`: not known.
    - `declared`: which way a metric improves, as the strategy's losses say it.
    """

    metrics: Collection[str]
    logged: Collection[str] | None
    declared: Mapping[str, Mode]


class Callback:
    """Base of all callbacks: a plain host object with hooks, none of which need be filled in.

    - `every`: `on_step_end` is called at the absolute outer steps that are multiples of it; the
      compiled loop stops there. `None`: the callback needs no such stop.
    - `name`: the key of the callback's state in a checkpoint, unique in a trainer. `None`: the
      name of the class.
    - `last`: run the hooks after those of all callbacks that do not say so. `Checkpoint` does,
      so that what the others did at a step is part of what it saves.
    - `writes`: the callback leaves files behind; `Trainer(fast_dev_run=...)` leaves it out.
    - `state_types`: the types of the values that `state_dict` returns, by name. A checkpoint with
      another type counts as damaged, and an older one is taken.
    - `logs`: all names under which it logs numbers and curves, if they are known before the first
      step; then a monitor of another name can be refused.
    - `grace`: how many seconds after Ctrl-C or SIGTERM a hook may take, at least a quarter of it if
      it begins late. Then a `KeyboardInterrupt` is raised in it, and the run ends without it: what
      it waits for may hang. `None`: however long it takes.
    """

    every: int | None = None
    name: str | None = None
    last: bool = False
    writes: bool = False
    logs: Collection[str] | None = None
    grace: float | None = 1.0
    state_types: Mapping[str, Any] = MappingProxyType({})

    def exclusive(self) -> AbstractContextManager[object]:
        """Entered before `fit` reads any file, and left however it ends: for what nobody else may
        touch meanwhile. Entering it raises if somebody else does."""
        return contextlib.nullcontext()

    def refuse(self, run: Run) -> None:
        """Raise if the run must not start, because its files would be somebody else's. Every
        callback is asked before any does anything, and none may leave a trace here."""

    def check_monitor(self, known: KnownNames) -> None:
        """Raise if there will be no value of a name that this callback waits for, or if it is not
        known which way that improves."""

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
        """When training ends by an error, before it reaches the caller of `fit`. Called if
        `on_fit_start` came to its end; what it raises is added to the error as a note."""

    def secure(self, run: Run) -> None:
        """After the last step, before `on_fit_end` of any callback, which may take its time: begin
        to save what must not be lost if the process ends meanwhile."""

    def on_fit_end(self, run: Run) -> None:
        """After the last step: also after a stop request, the time limit, or Ctrl-C. What it raises
        reaches the caller of `fit` once all callbacks have been called."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: JSON values only. Called when a checkpoint is written, so
        whatever the callback has buffered up to this step must reach its file here (`sync_files`
        sees to the disk)."""
        return {}

    def sync_files(self) -> None:
        """Until what `state_dict` has handed to the operating system is on the disk. Called after
        it, before the checkpoint gets its name, on another thread: training goes on meanwhile."""

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
    `ValueError` for two of the same name or a wrong `grace`; both for a wrong `every`.
    """
    expected = "a list of callbacks, or `[]`"
    check_argument(isinstance(callbacks, Iterable), callbacks, "callbacks", expected, TypeError)
    callbacks = tuple(callbacks)
    names: set[str] = set()
    for position, callback in enumerate(callbacks):
        where = f"callbacks[{position}]"
        expected = "an instance, not the class, of an `eqxmeta.callbacks.Callback`"
        check_argument(isinstance(callback, Callback), callback, where, expected, TypeError)
        _check_hooks(callback, where)
        _check_every(callback, where)
        grace, kinds = callback.grace, int | float | None
        sound = isinstance(grace, kinds) and (grace is None or grace > 0)
        check_argument(sound, grace, f"{where}.grace", "a positive number of seconds, or None")
        name = name_of(callback)
        sound = isinstance(name, str) and name
        check_argument(sound, name, f"{where}.name", "a name, or None", TypeError)
        if name in names:
            message = f"`{where}` has the name of an earlier callback."
            expected = "unique names, under which states are stored: set `.name` on one"
            raise ValueError(explain(message, f"{name!r} twice", expected))
        names.add(name)
    return tuple(sorted(callbacks, key=lambda c: c.last))


def _check_hooks(callback: Callback, where: str) -> None:
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in HOOKS:
            received = f"`{type(callback).__name__}.{name}`"
            expected = f"one of {', '.join(('refuse', *HOOKS))}"
            raise TypeError(explain(f"`{where}` has an unknown hook.", received, expected))
    for name in HOOKS:
        signature = inspect.signature(getattr(Callback, name))
        hook = getattr(callback, name)
        received = f"{name}={hook!r}, not a method"
        try:
            received = f"`{name}{inspect.signature(hook)}`"
            inspect.signature(hook).bind(*[None] * (len(signature.parameters) - 1))
        except TypeError as error:
            message = f"`{where}` has a hook of a wrong signature."
            raise TypeError(explain(message, received, f"`{name}{signature}`")) from error


def _check_every(callback: Callback, where: str) -> None:
    check_int_or_none(callback.every, f"{where}.every", minimum=1, what="outer steps")
    has_hook = type(callback).on_step_end is not Callback.on_step_end
    if callback.every is None and has_hook and "every" not in vars(callback):
        message = f"`{where}` has `on_step_end` but never says when."
        expected = "`every`: call it at multiples of that many outer steps"
        raise ValueError(explain(message, "every=None", expected))
