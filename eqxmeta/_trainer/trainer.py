"""The trainer."""

import contextlib
import signal
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
from jaxtyping import PyTree

from .._arguments import check_argument, check_choice, check_int, check_seed
from .._callback.callback import Callback, attach, name_of
from .._callback.monitor import check_monitors
from .._callback.run import OnNonFinite, Origin, Run, Settings
from .._errors import explain, tell, warn, warnings_end_nothing
from .._loop.loop import Loop
from .._loop.signals import Signals
from .._model.check import check_model
from .._model.state import TrainState, without_values
from .._preflight.outer_update import check_outer_update
from .._preflight.plan import Plan, make_plan
from .._strategy.metrics import SKIPPED
from .._strategy.strategy import Strategy
from .._task.mesh import Devices, check_divides, mesh_of
from .._task.processes import Processes
from .._task.source import open_source
from .resume import can_resume, find, restore, shared
from .start import check_the_same, initial_state
from .summary import describe, render

_EVALUATE = "`eqxmeta.evaluate(strategy, state.model, tasks)`; in a run the callback `Evaluate`"
# What users of other trainers call, and what does that here.
_ELSEWHERE = {
    "evaluate": _EVALUATE,
    "test": _EVALUATE,
    "validate": _EVALUATE,
    "predict": "`strategy.inner_adapt(state.model, support)`: a model, which takes an example",
    "load_from_checkpoint": "`eqxmeta.load_best(folder, strategy, model)`",
    "save_checkpoint": "`eqxmeta.save(path, state)`; in a run the callback `Checkpoint`",
}


class Trainer:
    """Meta-trains a model: `Trainer(strategy, ...).fit(model, tasks, steps)`.

    - `strategy`: the meta-algorithm, for example `eqxmeta.MAML(...)`.
    - `meta_batch_size`: tasks per outer step.
    - `seed`: of everything random. Step `i` sees tasks and dropout that depend on (seed, i) only.
    - `callbacks`: see `eqxmeta.callbacks`. The result of a run does not depend on them.
    - `devices`: those that share the tasks of every outer step, each computing its part: `"all"`,
      or some, such as `jax.devices()[:2]`; `None` is one. `meta_batch_size` must be a multiple of
      their number. The result is that of one device up to rounding, and for one number of devices
      the same to the bit. (`fit_seeds` divides the seeds instead.) After
      `jax.distributed.initialize` all devices of all processes take part, also with `None`: every
      process calls `fit` with the same arguments, and they end together. Files and the terminal
      are the first one's.
    - `steps_per_execution`: the most outer steps per dispatch of the compiled loop, at most 1024;
      `"auto"` aims at half a second. The result does not depend on it.
    - `max_time`: seconds, or a `timedelta`, after which a run ends as if it had been asked to. They
      count from the first step on, after compiling, and one chunk of steps is always taken.
    - `on_non_finite`: what to do at an outer step of which a metric (such as the loss or the
      gradient's norm), a parameter or a number of the optimizer's state is NaN or infinite. The
      step is never part of the result, whatever the policy, nor of a checkpoint.
      `"raise"`: `NonFiniteError`, whose `state` is the one after the step before; `Checkpoint`
      saves it. `"stop"`: the run ends after the step before, as if it had been asked to.
      `"skip"`: the step is not taken, and the run goes on with the next one's tasks. The metric
      `skipped` is 1 there, beside the values that were the reason; 100 such steps in a row raise.
      Their number is told at the end, in the summary or else by a `RuntimeWarning`.
      (`"raise"` and `"stop"` cost a run nothing, `"skip"` a look at every number of the state.)
    - `fast_dev_run`: `True` or a number of steps (`True` is 3): a trial run of so few steps, at
      the last of which `on_step_end` of every callback is called, whatever its `every`. Callbacks
      that write files are left out (the summary names them), but what they monitor is checked.
      Prints the first row of `plan`.
    - `summary`: print what is about to be trained, and why a run ended early.

    Raises `TypeError` or `ValueError` for invalid arguments.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        meta_batch_size: int,
        seed: int = 0,
        callbacks: Iterable[Callback] = (),
        devices: Devices = None,
        steps_per_execution: int | Literal["auto"] = "auto",
        max_time: int | float | timedelta | None = None,
        on_non_finite: OnNonFinite = "raise",
        fast_dev_run: bool | int = False,
        summary: bool = True,
    ):
        expected = "an instance of `Strategy`, such as `eqxmeta.MAML(...)`"
        argument = "Trainer(strategy=...)"
        check_argument(isinstance(strategy, Strategy), strategy, argument, expected, TypeError)
        self.strategy = strategy
        argument = "Trainer(meta_batch_size=...)"
        self.meta_batch_size = check_int(meta_batch_size, argument, minimum=1, what="tasks")
        self.seed = check_seed(seed, "Trainer(seed=...)")
        if steps_per_execution != "auto":
            argument, what = "Trainer(steps_per_execution=...)", "steps, or 'auto'"
            steps_per_execution = check_int(steps_per_execution, argument, minimum=1, what=what)
        if not isinstance(fast_dev_run, bool):
            argument, what = "Trainer(fast_dev_run=...)", "steps, or a bool"
            fast_dev_run = check_int(fast_dev_run, argument, minimum=1, what=what)
        check_choice(on_non_finite, "Trainer(on_non_finite=...)", get_args(OnNonFinite))
        self.callbacks = attach(callbacks)
        if devices is None and jax.process_count() > 1:
            devices = "all"
        self.mesh = mesh_of(devices, "Trainer(devices=...)")
        self.steps_per_execution: int | Literal["auto"] = steps_per_execution
        self.max_time = _seconds(max_time)
        self.on_non_finite: OnNonFinite = on_non_finite
        self.fast_dev_run = 3 if fast_dev_run is True else int(fast_dev_run)
        self.summary = summary
        self.stop_reason: str | None = None

    if not TYPE_CHECKING:  # to a type checker an attribute that is not there stays an error

        def __getattr__(self, name: str) -> Any:
            message = f"`Trainer` has no attribute {name!r}."
            if name in _ELSEWHERE:
                message = explain(message, f"`trainer.{name}`", _ELSEWHERE[name])
            raise AttributeError(message, name=name, obj=self)

    def fit(
        self,
        model: PyTree,
        tasks: Any,
        steps: int,
        *,
        resume: Literal["auto"] | str | Path | TrainState | None = None,
    ) -> TrainState:
        """Train until outer step `steps`, and return the state reached.

        - `model`: an Equinox module, one example in, one output out. It is left as it is.
        - `tasks`: an `eqx.Module` with `sample(key) -> Task`, or a host source:
          `tasks[step]` is a batch of `meta_batch_size` tasks in NumPy.
        - `steps`: counted from the very first, also when resuming.
        - `resume`: `"auto"` continues from the newest sound checkpoint of an attached
          `Checkpoint`, or starts if there is none; a path continues from that file; `None` starts.
          A `TrainState` (such as `strategy.init(model)`, or what an earlier `fit` returned, with
          other numbers in it) is taken as it is, in the place of the one that `model` would give:
          a new run, with files of its own, that begins at `state.step`.

        To change the learning rate of a run that is resumed, give the outer optimizer the new one,
        `optax.adam(1e-4)` or `optax.inject_hyperparams(optax.adam)(1e-4)`: all numbers of the outer
        optimizer are those of the run that asks, the rest of the state is the checkpoint's. (What
        `inject_hyperparams` has in the state is then told with both values, as a
        `RuntimeWarning`.) Anything else in the strategy that differs makes it another run, which is
        refused. Where it was computed with another number of cores, device or library, a
        `RuntimeWarning` says that the same bits cannot be expected.

        The first Ctrl-C ends the run after the current chunk, with the hooks of a run's end (so
        that `Checkpoint` saves), and the state is returned; a second one raises. The attribute
        `stop_reason` is then "interrupted": a script may `sys.exit(130)`, as the shell expects.
        SIGTERM ends the run in the same way, and after it the process: `SystemExit(143)`, or the
        handler that was there before. Neither waits for a source, a hook (see `Callback.grace`) or
        a disk that takes longer than a second or two; nor does `max_time` for a source. What
        happens is said at once, on stderr. Before the first step there is nothing to save, and
        Ctrl-C raises a `KeyboardInterrupt` (with which a script ends with 130).

        Raises `NonFiniteError` if a metric or parameter becomes NaN or infinite, `CheckpointError`
        if a run cannot be resumed, `TypeError` or `ValueError` for invalid arguments.
        """
        steps = check_int(steps, "fit(steps=...)", minimum=1, what="outer steps")
        check_model(model, "fit(model=...)")
        processes = Processes(self.mesh)
        if jax.process_count() > 1 and not processes.several:
            message = "`Trainer(devices=...)` leaves other processes out."
            received = f"{'one device' if self.mesh is None else self.mesh.size} here, of "
            received += f"{jax.device_count()} in {jax.process_count()} processes"
            raise ValueError(explain(message, received, "devices='all'"))
        talk = self.summary and processes.first
        with Signals(signal.SIGINT, signal.SIGTERM, talk=talk) as signals, processes.together():
            return self._fit(model, tasks, steps, resume, signals, processes)

    def _fit(
        self,
        model: PyTree,
        tasks: Any,
        steps: int,
        resume: Literal["auto"] | str | Path | TrainState | None,
        signals: Signals,
        processes: Processes,
    ) -> TrainState:
        callbacks = self.callbacks
        check_divides(self.mesh, self.meta_batch_size, "Trainer(meta_batch_size=...)")
        if self.fast_dev_run:
            steps, resume = min(steps, self.fast_dev_run), None
            callbacks = tuple(callback for callback in callbacks if not callback.writes)
        self.stop_reason = None

        state = initial_state(self.strategy, model, "fit(model=...)")
        config = describe(
            self.strategy, model, state, tasks,
            steps=steps, seed=self.seed, meta_batch_size=self.meta_batch_size,
            saves=not isinstance(resume, TrainState | None) or any(map(can_resume, callbacks)),
            mesh=self.mesh,
        )  # fmt: skip
        settings = Settings(
            self.strategy,
            steps,
            self.seed,
            everys=self._everys(callbacks, steps),
            max_time=self.max_time,
            steps_per_execution=self.steps_per_execution,
            on_non_finite=self.on_non_finite,
            config=config,
            mesh=self.mesh,
        )
        summary = self.summary and processes.first
        if not processes.first:  # files have one writer
            callbacks = tuple(callback for callback in callbacks if not callback.writes)
        with contextlib.ExitStack() as held:
            for callback in callbacks:
                held.enter_context(callback.exclusive())
            check_the_same(settings, self.callbacks, processes)
            if processes.first:
                found = find(resume, callbacks)
                if found:  # shapes are enough, and the arrays would be in the way of those to come
                    state = without_values(state)
                origin = restore(resume, found, state, callbacks, config)
            else:
                origin = Origin(state)
            origin = shared(origin, processes)
            start, state = int(origin.state.step), origin.state
            opened = open_source(
                tasks, self.meta_batch_size, "fit(tasks=...)",
                start=start, steps=steps, mesh=self.mesh,
            )  # fmt: skip
            source = held.enter_context(opened)
            checked = check_outer_update(self.strategy, state, source.example, self.mesh)
            metrics, divided = checked
            loop = Loop(settings, origin, source, callbacks, metrics, signals, processes)
            loop.refuse()
            # Of those too that a trial run leaves out.
            skipped = {SKIPPED} if self.on_non_finite == "skip" else set()
            check_monitors(self.callbacks, metrics | skipped, self.strategy)
            if summary:
                left_out = [callback for callback in self.callbacks if callback not in callbacks]
                told = render(
                    config, callbacks, left_out,
                    start=start, model=model, mesh=self.mesh, divided=divided,
                )  # fmt: skip
                tell(told)
                if self.fast_dev_run:
                    tell(make_plan(self.strategy, state, source.example, self.mesh, alone=True))
            held.enter_context(warnings_end_nothing())
            del origin, state  # the loop has a copy, and the run may be long
            state = loop.train()
            self._say_how_it_ended(loop.run, summary)
        return state

    def _everys(self, callbacks: Iterable[Callback], steps: int) -> dict[str, int]:
        """By name, the `every` of each callback that has one: in a trial run all of its steps."""
        everys = {name_of(callback): callback.every for callback in callbacks}
        return {
            name: steps if self.fast_dev_run else every
            for name, every in everys.items()
            if every is not None
        }

    def _say_how_it_ended(self, run: Run, summary: bool) -> None:
        self.stop_reason = run.stop_reason
        if summary and run.stop_reason is not None:
            reached = f"{run.step:,} of {run.steps:,}"
            tell(f"stopped at step {reached}: {run.stop_reason}")
        if run.skipped:
            skipped = f"skipped {run.skipped:,} steps that were not finite"
            if summary:
                tell(skipped)
            else:
                warn(f"The run {skipped}.")

    def plan(self, model: PyTree, tasks: Any, *, devices: Devices = None) -> Plan:
        """What an outer step will cost: memory, operations and compile time, as it is and with
        another `gradient`, `remat` or `task_chunk`, as a table to print; and which to take.

        `model` and `tasks` as for `fit`. `devices`: for others than those of the trainer; what is
        told is then of each of them. Every row is compiled, none is run.
        Raises `TypeError` or `ValueError` for invalid arguments.
        """
        check_model(model, "plan(model=...)")
        state = initial_state(self.strategy, model, "plan(model=...)")
        with open_source(tasks, self.meta_batch_size, "plan(tasks=...)", steps=1) as source:
            mesh = self.mesh if devices is None else mesh_of(devices, "plan(devices=...)")
            check_divides(mesh, self.meta_batch_size, "Trainer(meta_batch_size=...)")
            check_outer_update(self.strategy, state, source.example, mesh)
            return make_plan(self.strategy, state, source.example, mesh)


def _seconds(max_time: int | float | timedelta | None) -> float:
    if max_time is None:
        return float("inf")
    seconds = max_time.total_seconds() if isinstance(max_time, timedelta) else max_time
    sound = isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
    expected = "a positive number of seconds, or a `timedelta`"
    check_argument(sound, max_time, "Trainer(max_time=...)", expected)
    return float(seconds)
