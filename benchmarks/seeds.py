"""A run with several seeds at once against one after another."""

import eqxmeta as em

from ._report import Row
from ._timing import paired
from ._workload import TASKS
from .loop import notebook_maml, notebook_model, notebook_tasks

SEEDS = 8


def run(pairs, quick):
    target, what = "seeds", f"speed of fit_seeds over {SEEDS} runs of fit"
    try:
        from eqxmeta._trainer.seeds import fit_seeds
    except ImportError as error:
        return [Row(target, what, [], note=f"not measured: {error}")]

    steps = 20 if quick else 5000
    model, tasks, strategy = notebook_model(), notebook_tasks(), notebook_maml()
    trainers = [
        em.Trainer(strategy, meta_batch_size=TASKS, seed=seed, summary=False)
        for seed in range(SEEDS)
    ]

    def one_by_one():
        return [trainer.fit(model, tasks, steps) for trainer in trainers]

    def at_once():
        return fit_seeds(trainers[0], model, tasks, steps, seeds=SEEDS).states

    ratio = paired(one_by_one, {"at once": at_once}, pairs)["at once"]
    return [Row(target, what, ratio)]
