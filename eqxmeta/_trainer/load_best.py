"""The best state that a run has saved."""

import os

from jaxtyping import PyTree

from .._arguments import check_argument, check_path
from .._checkpoint.names import best_of
from .._checkpoint.save_load import load_state
from .._errors import CheckpointNotFound, explain
from .._model.check import check_model
from .._model.state import TrainState
from .._strategy.strategy import Strategy
from .start import initial_state


def load_best(
    folder: str | os.PathLike[str],
    strategy: Strategy,
    model: PyTree,
    monitor: str | None = None,
) -> TrainState:
    """The best state that a run has saved into `folder`, by what its `Checkpoint` monitored.

        state = em.load_best("checkpoints/sine", strategy, model)

    - `strategy`, `model`: those of the run. Of the model only the structure counts.
    - `monitor`: the name by which, if the run was resumed with another. `None`: the last one.

    It is the one that `Checkpoint.best_path` names; `Checkpoint` says which saves count.

    Raises `CheckpointNotFound` if there is no folder, no sound checkpoint or none with a value,
    `CheckpointMismatch` if the strategy or the model has other arrays, and what `load` raises.
    """
    folder = check_path(folder, "load_best(folder=...)")
    sound, argument = isinstance(strategy, Strategy), "load_best(strategy=...)"
    check_argument(sound, strategy, argument, "an instance of `Strategy`", TypeError)
    check_model(model, "load_best(model=...)")
    sound = monitor is None or (isinstance(monitor, str) and monitor)
    expected = "a name that `Checkpoint(monitor=...)` was given, or None"
    check_argument(sound, monitor, "load_best(monitor=...)", expected)
    if not folder.is_dir():
        received = f"a file, '{folder}'" if folder.exists() else f"'{folder}', which does not exist"
        expected = "a folder of `Checkpoint`; the model in one of its files is "
        expected += "`eqxmeta.load_model(path, model)`"
        message = "`load_best(folder=...)` is no folder of checkpoints."
        raise CheckpointNotFound(explain(message, received, expected))
    like = initial_state(strategy, model, "load_best(model=...)")
    return load_state(best_of(folder, monitor), like, "`strategy.init(model)`")
