"""A callback that evaluates on fixed tasks."""

import time
from collections.abc import Callable, Collection
from typing import Any

from jaxtyping import PyTree

from eqxmeta._arguments import check_argument, check_int, check_int_or_none, check_seed
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.model_of import check_model_of, model_of
from eqxmeta._callback.published import Curve
from eqxmeta._callback.run import Run
from eqxmeta._evaluation.evaluate import check_curve, check_steps, measure
from eqxmeta._evaluation.result import Evaluation
from eqxmeta._evaluation.tasks import check_tasks
from eqxmeta._model.check import check_model
from eqxmeta._model.state import TrainState
from eqxmeta._model.support_statistics import TransductiveLayer, has_layer


class Evaluate(Callback):
    """Measures the strategy on tasks that it does not train on, at multiples of `every`, at the end
    of the run, and with `at_start=True` before its first step.

    Logs a curve over inner steps for every metric, as `<prefix>/<metric>`, and for a model
    that predicts queries together (see `eqxmeta.Evaluation`) `<prefix>/transductive`. The arguments
    are those of `eqxmeta.evaluate`; the same `seed` every time means the same tasks every time. For
    several evaluations in one run give each a `prefix` of its own.

    The end of a run may be at no multiple of `every`: its `steps` are none, or `max_time`, Ctrl-C
    or a callback ended it. What is measured there goes into the checkpoint and, with a mark, into
    the logs, but is no observation for `EarlyStopping`, and for the best checkpoint only if all
    `steps` were taken: a run that is resumed goes on as if it had not been. After SIGTERM, which
    leaves no time, it is not measured.

    - `model`: `lambda state: model`, what is measured in the place of `state.model`: an average of
      the weights, for example. It has the structure of `state.model`.
    - `result`: the newest `Evaluation`; `None` before the first.
    - `seconds`: wall time spent evaluating, compilation included.
    """

    logs: Collection[str] | None = None  # known once the strategy is
    grace = None  # what was begun is of use

    def __init__(
        self,
        tasks: Any,
        *,
        every: int,
        at_start: bool = False,
        num_tasks: int = 600,
        inner_steps: int | None = None,
        seed: int = 0,
        model: Callable[[TrainState], PyTree] | None = None,
        prefix: str = "eval",
        name: str | None = None,
    ):
        sound = isinstance(prefix, str) and prefix
        check_argument(sound, prefix, "Evaluate(prefix=...)", "a name")
        self.every = check_int(every, "Evaluate(every=...)", minimum=1, what="outer steps")
        sound, argument = isinstance(at_start, bool), "Evaluate(at_start=...)"
        check_argument(sound, at_start, argument, "True or False", TypeError)
        argument = "Evaluate(inner_steps=...)"
        self._inner_steps = check_int_or_none(inner_steps, argument, minimum=1, what="inner steps")
        self._seed = check_seed(seed, "Evaluate(seed=...)")
        self._task, self._num_tasks = check_tasks(tasks, num_tasks, "Evaluate")
        self.name = f"Evaluate[{prefix}]" if name is None and prefix != "eval" else name
        check_model_of(model, "Evaluate(model=...)")
        self._model = model
        self.result: Evaluation | None = None
        self.seconds = 0.0
        self._measured: int | None = None  # at which step of this run
        self._at_start = at_start
        self._tasks = tasks
        self._prefix = prefix

    def refuse(self, run: Run) -> None:
        # Now, and not at the first evaluation, which may be hours away.
        steps = check_steps(run.strategy, self._inner_steps, "Evaluate")
        # One step is as good as many to find what cannot be traced.
        model = self._model_of(run)
        check_model(model, "Evaluate(model=...)", trained=True)
        names = check_curve(run.strategy, model, self._task, None if steps is None else 1)
        names += ("transductive",) * has_layer(model, TransductiveLayer)
        self.logs = [f"{self._prefix}/{name}" for name in names]

    def on_fit_start(self, run: Run) -> None:
        self._measured = None
        if self._at_start and run.step == 0:
            self.on_step_end(run)

    def on_fit_end(self, run: Run) -> None:
        if run.step not in (run.start, self._measured) and not run.terminated:
            self.on_step_end(run)

    def on_step_end(self, run: Run) -> None:
        begin = time.perf_counter()
        steps = check_steps(run.strategy, self._inner_steps, "Evaluate")
        first = self.result is None
        what = "compiling and evaluating" if first else "evaluating"
        with run.doing(f"{what} {self._prefix}", tell=first):
            result = measure(
                run.strategy,
                self._model_of(run),
                self._tasks,
                self._task,
                num_tasks=self._num_tasks,
                steps=steps,
                seed=self._seed,
                mesh=run.mesh,
                argument="Evaluate(tasks=...)",
            )
        self.result = result
        self._measured = run.step
        self.seconds += time.perf_counter() - begin
        run.log(
            {
                f"{self._prefix}/{metric}": Curve(result.mean(metric), result.ci95(metric))
                for metric in result.metrics
            }
            # Said only where it is so: the curves are then not comparable with most published ones.
            | ({f"{self._prefix}/transductive": 1.0} if result.transductive else {})
        )

    def _model_of(self, run: Run) -> PyTree:
        return model_of(run.state, self._model, "Evaluate(model=...)")
