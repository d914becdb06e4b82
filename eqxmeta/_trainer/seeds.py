"""Several seeds of a run as one compiled program."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .._arguments import check_int
from .._preflight.outer_update import check_outer_update
from .._task.device_source import Sampled
from .runs import SeedRuns
from .seed_arguments import check_alike, check_models, check_seeds, check_source, check_trainer
from .several import fit_several, stack
from .start import initial_state
from .trainer import Trainer


def fit_seeds(
    trainer: Trainer,
    model: PyTree,
    tasks: Any,
    steps: int,
    *,
    seeds: int | Sequence[int] | np.ndarray,
) -> SeedRuns:
    """What `trainer.fit(model, tasks, steps)` computes, for several seeds in one compiled program.

    - `trainer`: without callbacks. Its own seed matters only if `seeds` is a number of them. Its
      `devices` share the seeds, and need no communication.
    - `model`: one from which every run starts, or a list of one per seed.
    - `tasks`: an `eqx.Module` with `sample(key) -> Task`.
    - `seeds`: distinct seeds; or how many: `trainer.seed`, `trainer.seed + 1`, ...

    Run `i` is that of a trainer with `seed=seeds[i]`, up to rounding. Memory is that of all runs
    together. A run that diverges does not stop the others: a `RuntimeWarning` at the end tells of
    it. The first Ctrl-C and `max_time` end all runs after the current chunk.

    Raises `TypeError` or `ValueError` for invalid arguments.
    """
    check_trainer(trainer, "fit_seeds(trainer=...)", "SeedRuns")
    steps = check_int(steps, "fit_seeds(steps=...)", minimum=1, what="outer steps")
    chosen = check_seeds(seeds, trainer.seed)
    models = check_models(model, len(chosen))
    check_source(tasks, "fit_seeds")
    steps = min(steps, trainer.fast_dev_run or steps)

    strategy = trainer.strategy
    inits = [initial_state(strategy, m, "fit_seeds(model=...)") for m in models]
    check_alike(inits, "fit_seeds(model=...)", "models")
    source = Sampled(tasks, trainer.meta_batch_size)
    check_outer_update(strategy, inits[0], source.example)
    states = stack(inits * len(chosen) if len(inits) == 1 else inits)
    names = [f"seed {seed}" for seed in chosen]
    runs = fit_several(trainer, source, states, chosen, steps, names=names, caller="fit_seeds")
    return SeedRuns(chosen, *runs)
