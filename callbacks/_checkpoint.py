"""A callback that saves the run, so that it can be resumed, and the best state."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from eqxmeta._arguments import (
    check_argument,
    check_choice,
    check_folder,
    check_int,
    check_int_or_none,
    check_json,
    check_path,
    place_of,
)
from eqxmeta._callback.best import Best, Value
from eqxmeta._callback.callback import Callback, KnownNames
from eqxmeta._callback.in_flight import InFlight
from eqxmeta._callback.model_of import check_model_of, model_of
from eqxmeta._callback.monitor import Monitor
from eqxmeta._callback.published import Published
from eqxmeta._callback.run import Run
from eqxmeta._checkpoint.run_files import CheckpointFiles, id_of, write
from eqxmeta._checkpoint.save_load import on_host
from eqxmeta._direction import Mode
from eqxmeta._errors import NonFiniteError, explain, warn
from eqxmeta._files.lock import locked
from eqxmeta._files.patience import hurried
from eqxmeta._model.averaged import with_averaged
from eqxmeta._model.state import TrainState


class Checkpoint(Callback):
    """Saves the run every `every` outer steps and at its end, as `folder/step-000001000.ckpt`.

    `fit(resume="auto")` continues from the newest sound file. Saved as well is the last good state
    of a run that ends with a `NonFiniteError`; nothing saved is ever NaN or infinite.

    - `keep`: how many of the newest files stay; `None` keeps all.
    - `monitor`: the file of the best value stays as well, or with `keep_best` those of the so many
      best. A name logged with `run.log` at the
      step that is saved, such as `"eval/loss"` of `Evaluate` (of a curve over inner steps the last
      point counts, and `"eval/loss/after_1"` is the one after 1 step), or a training metric such
      as `"loss"`, as it was in that very step.
    - `mode`: `"min"` if less is better, `"max"` if more is. `None`: what is known of the metric,
      `"max"` of `accuracy`, `"min"` of losses, and what `eqxmeta.losses.directed` declares; of
      others it is asked for before the run. The last part of the name decides, without `after_<k>`
      and `_before`. Of equals the first is the best.
    - `keep_best`: how many of the best by `monitor` stay.
    - `model`: `lambda state: model`, an average of the weights for example. The files then hold it
      beside the state, and `eqxmeta.load_model` takes it out of them; `fit(resume=...)` and
      `load_best` take the state. Give the same function to `Evaluate`, so that it is this model
      that is monitored.
    - `overwrite`: a run that is not resumed takes the place of the one in the folder, whose files
      are renamed to `*.ckpt.stale`. (A warning says how many.)
    - `on_error`: whether a file that could not be written, or does not read back as it was written,
      ends the run (`"raise"`) or not (`"warn"`: a `RuntimeWarning`; the next save is tried anew).

    The best is that of the saves at multiples of `every`; what is saved besides, because the run
    ended there, counts if all `steps` were taken, until the run goes on.
    `eqxmeta.load_best(folder, strategy, model)` loads it.

    Training waits only while the state is copied to the host. A thread writes the file and reads
    it back; what it fails by is raised at the next chunk's end. The next save waits for it, and so
    does the end of `fit`, however that comes about. Meanwhile the folder is locked: another run
    that would write to it is refused (`CheckpointInUse`).

    Removed are only files that this run has written (before it was resumed included), and only
    once the newer file has been read back. A run that is not resumed refuses a folder with
    checkpoints (`FileExistsError`), unless it may `overwrite`; one that is resumed from an earlier
    step renames the later files to `*.ckpt.stale`.

    A `monitor` that no callback will log is refused (`ValueError`) before the first step, or, if
    there are callbacks of your own, warned of once each has had its turn. Warns at the end of the
    run if `monitor` had no value at any save.
    """

    last = True
    writes = True
    logs = ()
    grace = None  # it sees to that itself
    state_types = MappingProxyType(
        {
            "monitor": str | None,
            "mode": str | None,
            "best_step": int | None,
            "best_value": int | float | None,
            "behind": dict[str, int | float],
            "others": list,
        }
    )

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int,
        keep: int | None = 3,
        monitor: str | None = None,
        mode: Mode | None = None,
        keep_best: int = 1,
        model: Callable[[TrainState], PyTree] | None = None,
        overwrite: bool = False,
        on_error: Literal["raise", "warn"] = "raise",
        name: str | None = None,
    ):
        sound = monitor is None or (isinstance(monitor, str) and monitor)
        expected = "the name of a logged value, or None"
        check_argument(sound, monitor, "Checkpoint(monitor=...)", expected)
        check_choice(on_error, "Checkpoint(on_error=...)", ("raise", "warn"))
        self.folder = self._place = check_path(folder, "Checkpoint(folder=...)")
        self.every = check_int(every, "Checkpoint(every=...)", minimum=1, what="outer steps")
        self.keep = check_int_or_none(keep, "Checkpoint(keep=...)", minimum=1, what="files")
        argument = "Checkpoint(keep_best=...)"
        self.keep_best = check_int(keep_best, argument, minimum=1, what="files")
        sound, expected = (
            keep_best == 1 or monitor is not None,
            "1, or a `monitor` to tell the best by",
        )
        check_argument(sound, keep_best, argument, expected, fault="has no effect")
        check_model_of(model, "Checkpoint(model=...)")
        self.monitor = monitor
        self.mode = mode
        self.model = model
        self.overwrite = overwrite
        self.on_error = on_error
        self.name = name
        self._restored: dict[str, Any] = {}
        self._monitor = Monitor("Checkpoint", monitor, mode)
        self._best = Best(self._monitor, self.every, keep_best)
        self._in_flight = InFlight(on_error)
        self._check_lock: Callable[[], None] = lambda: None
        self._forget()

    @property
    def last_path(self) -> Path | None:
        """The newest file of this run."""
        return self._files.path(max(self._mine)) if self._mine else None

    @property
    def best_path(self) -> Path | None:
        """The file of this run with the best value of `monitor`."""
        step = self._best.step
        return None if step is None else self._files.path(step)

    @property
    def _files(self) -> CheckpointFiles:
        return CheckpointFiles(self._place)

    def resume_paths(self) -> Sequence[Path]:
        return [path for _, path in sorted(self._files.by_step().items(), reverse=True)]

    def state_dict(self) -> dict[str, Any]:
        self._in_flight.settle()  # so that what is stored does not depend on the disk
        return self._best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = dict(state)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._place = place_of(self.folder, "Checkpoint(folder=...)")
        check_folder(self._place, "Checkpoint(folder=...)")
        with ExitStack() as held:
            self._check_lock = held.enter_context(locked(self._place))
            try:
                yield
            finally:
                try:
                    # The hooks have waited, unless they were interrupted; what ends `fit` is told.
                    with suppress(Exception):
                        self._in_flight.background.wait()
                finally:
                    background = self._in_flight.background
                    if background.busy:  # on a disk that does not answer: the lock stays
                        background.when_done(held.pop_all().close)

    def check_monitor(self, known: KnownNames) -> None:
        if known.logged is not None:
            self._monitor.check({*known.metrics, *known.logged})
        self._monitor.direction(known.declared)

    def refuse(self, run: Run) -> None:
        if not run.resuming and not self.overwrite:
            self._files.refuse_any()
        if self.model is not None:
            model_of(run.state, self.model, "Checkpoint(model=...)")

    def on_fit_start(self, run: Run) -> None:
        self.refuse(run)
        restored, self._restored = self._restored, {}
        self._forget()
        self._monitor.begin(run)
        self._id = run.id
        self._check_lock()
        self._files.prepare()
        if not run.resuming:
            if self.overwrite:
                self._files.set_aside_all()
            return
        self._files.set_aside(after=run.start)
        self._id = run.resumed_meta.get("run", self._id)
        if restored:
            files = self._files.by_step().items()
            # The newest has been read, and is of this run.
            self._mine = {s for s, p in files if p == run.resumed_from or id_of(p) == self._id}
            self._best.restore(restored, run, self._mine)
            self._remove_old()  # a run that was killed may not have come to it

    def on_chunk_end(self, run: Run, metrics: Mapping[str, np.ndarray]) -> None:
        step = int(metrics["step"][-1])
        last = {name: rows[-1] for name, rows in metrics.items() if name != "step"}
        self._best.observe(step, last)
        if not self._in_flight.background.busy:
            self._in_flight.settle()

    def on_log(self, run: Run, scalars: Mapping[str, Published]) -> None:
        self._best.observe(run.step, scalars, ended=run.ended)

    def on_step_end(self, run: Run) -> None:
        if self._best.newest is None:
            self._monitor.warn_if_overdue(run)
        self._save(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        # The last good state. After other errors there may be none.
        if isinstance(error, NonFiniteError):
            self._save_last(run)
        else:
            self._in_flight.settle()

    def secure(self, run: Run) -> None:
        writing = self._in_flight.step == run.step
        if run.step > run.start and run.step not in self._mine and not writing:
            self._save(run)

    def on_fit_end(self, run: Run) -> None:
        self._save_last(run)
        self._add_value(run)
        told = self._best.end(run, self._mine) or self._monitor.warned or run.step == run.start
        if self.monitor is not None and not told:
            message = f"`Checkpoint(monitor={self.monitor!r})` had no value at any save."
            received = ", ".join(sorted(self._monitor.seen)) or "nothing was logged"
            when = f"logged at multiples of `Checkpoint(every={self.every})`"
            warn(explain(message, received, f"the name of a number or curve, {when}"))

    def _forget(self) -> None:
        # In every file of the run: what tells it from files of others in the same folder. Not part
        # of the state: two runs that are the same but for their id are the same.
        self._id: str | None = None
        self._mine: set[int] = set()
        self._best.forget()
        self._in_flight.forget()
        self._meta: dict[str, Any] = {}  # what the newest file says

    def _save(self, run: Run) -> None:
        """Everything that goes into the file is what it is now; the file follows."""
        self._in_flight.settle()
        step, path, best = run.step, self._files.path(run.step), self._best.saved
        self._best.saved = candidate = self._best.once_saved(step)
        try:
            meta = {
                "step": step,
                "file": path.name,
                "seed": run.config["seed"],
                "run": self._id,
                "config": run.config,
                "skipped": run.skipped,
                "skipped_in_a_row": run.skipped_in_a_row,
                "monitored": self._best.told(step),
                "callbacks": run.callback_states(),  # ours too, so it knows already of this file
            }
            # A copy: the callbacks may return what they go on changing.
            check_json(meta, "meta", 0)
            meta = json.loads(json.dumps(meta))
            state = on_host(self._to_save(run.state))
        finally:
            self._best.saved = best
        size = sum(x.nbytes for x in jax.tree.leaves(state) if eqx.is_array(x))
        self._check_lock()

        def before() -> None:
            # What it says is in the logs is on the disk before it. Where the process is to end, the
            # logs are synced at the run's end, which waits no longer than it may.
            if not hurried():
                run.sync_callbacks()

        check = self._check_lock
        self._in_flight.start(
            step,
            path,
            lambda: write(path, state, meta, check=check, before=before),
            lambda: self._add(step, candidate),
            size,
        )
        self._meta = meta

    def _add_value(self, run: Run) -> None:
        """To the file of the last step, which was written first, what has been measured since. Not
        the states of callbacks, which are those of a run that goes on."""
        if run.step in self._mine and self._meta.get("step") == run.step:
            meta = self._meta | {"monitored": self._best.told(run.step)}
            if meta != self._meta:
                path, state = self._files.path(run.step), on_host(self._to_save(run.state))
                check = self._check_lock
                self._in_flight.start(
                    run.step,
                    path,
                    lambda: write(path, state, meta, check=check, again=True),
                    lambda: self._add(run.step, self._best.saved),
                )
                self._in_flight.settle()

    def _save_last(self, run: Run) -> None:
        try:
            self._in_flight.settle()
        except Exception:  # of the file before: what was wrong may have passed
            self._save_new(run)
            raise
        self._save_new(run)

    def _save_new(self, run: Run) -> None:
        path = self._files.path(run.step)
        there = self._in_flight.step == run.step and path.exists()  # though perhaps not on the disk
        if run.step > run.start and run.step not in self._mine and not there:
            self._save(run)
            self._in_flight.settle()
        if self._in_flight.background.busy:
            state = "in its place, but not synced" if path.exists() else "not written"
            warn(f"{path} is {state}: the disk took too long for a process that is to end.")

    def _add(self, step: int, best: tuple[Value, ...]) -> None:
        """The file of `step` is there: with it these are the best."""
        self._best.saved = best
        self._mine.add(step)
        self._remove_old()

    def _to_save(self, state: TrainState) -> PyTree:
        if self.model is None:
            return state
        return with_averaged(state, model_of(state, self.model, "Checkpoint(model=...)"))

    def _remove_old(self) -> None:
        if self.keep is None:
            return
        best = {step for step, _ in self._best.saved}
        stay = {*sorted(self._mine)[-self.keep :], *self._best.others, *best}
        gone = self._files.remove(sorted(self._mine - stay), self._id, self._check_lock)
        self._mine.difference_update(gone)
