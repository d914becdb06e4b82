"""What `fit_seeds` and `fit_grid` accept: seeds, states that differ in values only, a source on the
device, a trainer that watches nothing."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._arguments import check_argument, check_int, check_seed
from .._errors import explain
from .._model.check import check_model
from .._model.state import TrainState
from .._task.device_source import check_device_source, is_device_source
from .._task.processes import Processes
from .trainer import Trainer


def check_seeds(seeds: Any, first: int) -> tuple[int, ...]:
    argument = "fit_seeds(seeds=...)"
    if isinstance(seeds, np.ndarray) and seeds.ndim == 1:
        seeds = list(seeds)
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        seeds = check_int(seeds, argument, minimum=1, what="seeds, or a sequence of distinct seeds")
        seeds = range(first, first + seeds)
    seeds = [check_seed(seed, argument) for seed in seeds]
    sound = seeds and len(set(seeds)) == len(seeds)
    fault = "is empty or repeats a seed"
    check_argument(sound, seeds, argument, "1 or more distinct seeds", ValueError, fault)
    return tuple(seeds)


def check_models(model: Any, n: int) -> list[Any]:
    argument = "fit_seeds(model=...)"
    if not isinstance(model, list | tuple):
        check_model(model, argument)
        return [model]
    if len(model) != n:
        message = f"`{argument}` is not one model per seed."
        received, expected = f"{len(model)} models for {n} seeds", "one per seed, or one for all"
        raise ValueError(explain(message, received, expected))
    for index, one in enumerate(model):
        check_model(one, f"fit_seeds(model=...)[{index}]")
    return list(model)


def check_trainer(trainer: Any, argument: str, result: str) -> None:
    """That of runs which nothing watches; `result` is what tells how they went."""
    expected = "an instance of `eqxmeta.Trainer`"
    sound, fault = isinstance(trainer, Trainer), "is not a trainer"
    check_argument(sound, trainer, argument, expected, TypeError, fault)
    if Processes(trainer.mesh).several:
        message = f"`{argument}` shares its devices with other processes."
        expected = "`Trainer(devices=jax.local_devices())`: runs of its own in each process"
        raise ValueError(explain(message, f"devices of {jax.process_count()} processes", expected))
    if trainer.callbacks:
        message = f"`{argument}` has callbacks, which watch a single run."
        received = ", ".join(type(callback).__name__ for callback in trainer.callbacks)
        expected = "`Trainer(callbacks=[])`; evaluate `runs.state(i).model` afterwards"
        raise ValueError(explain(message, received, expected))
    if trainer.on_non_finite != "raise":
        message = f"`{argument}` has a policy for NaN and infinity."
        received = f"on_non_finite={trainer.on_non_finite!r}"
        expected = f"the default: a run that diverges stops no other, and `{result}.finite` tells"
        raise ValueError(explain(message, received, expected))


def check_source(tasks: Any, caller: str) -> None:
    if not is_device_source(tasks) and hasattr(tasks, "__getitem__"):
        message = f"`{caller}(tasks=...)` is read by the host."
        received = f"{type(tasks).__name__}, with `tasks[step]`"
        expected = "an `eqx.Module` with `sample(key) -> Task`: each run draws tasks of its own"
        raise ValueError(explain(message, received, expected))
    check_device_source(tasks, f"{caller}(tasks=...)", adapts=False)


def check_alike(states: list[TrainState], argument: str, what: str) -> None:
    """Only arrays may differ from run to run, and only in their values. `what`: whose states."""
    structure, before = jax.tree.structure(states[0]), _layout(states[0])
    for index, state in enumerate(states[1:], start=1):
        after = _layout(state)
        paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        if paths or jax.tree.structure(state) != structure:
            shown = [f"{path[1:]}: {before.get(path)} and {after.get(path)}" for path in paths]
            message = f"`{argument}` differs between {what} 0 and {index}."
            received = "; ".join(shown)[:500] or "another structure, or another static field"
            expected = f"{what} that differ in the values of their arrays only"
            raise ValueError(explain(message, received, expected))


def _layout(state: TrainState) -> dict[str, str]:
    def show(x: Any) -> str:
        if isinstance(x, np.ndarray):  # not trained: a constant, of which one serves all runs
            return f"numpy {x.dtype.name}{list(x.shape)} of hash {hash(x.tobytes())}"
        return f"{x.dtype.name}{list(x.shape)}" if eqx.is_array(x) else repr(x)

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): show(x) for path, x in leaves}
