"""Several rates at once against one after another, with what each compiles."""

import jax.numpy as jnp
import optax

import eqxmeta as em

from ._report import Row
from ._timing import in_turn, ratios
from ._workload import INNER_RATE, TASKS
from .loop import notebook_model, notebook_tasks

RATES = [2e-3 / 2**k for k in range(8)]


def trainer(outer, wrap=lambda adam: adam):
    inner = em.InnerLoop(optax.sgd(INNER_RATE), 1)
    strategy = em.MAML(em.losses.mse, inner, wrap(optax.adam)(outer))
    return em.Trainer(strategy, meta_batch_size=TASKS, summary=False)


def run(pairs, quick):
    model, tasks = notebook_model(), notebook_tasks()

    def at_once(steps):
        return em.fit_grid(trainer, model, tasks, steps, grid={"outer": RATES}).states

    def one_by_one(steps):  # an optimizer with another rate is another program
        return [trainer(rate).fit(model, tasks, steps) for rate in RATES]

    def one_program(steps):  # the rate is set in the optimizer's state
        alone, states = trainer(RATES[0], optax.inject_hyperparams), []
        for rate in RATES:
            start = alone.strategy.init(model)
            start.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
            states.append(alone.fit(model, tasks, steps, resume=start))
        return states

    rows = []
    for steps in (20,) if quick else (1_000, 10_000):
        doors = {"grid": at_once, "apart": one_by_one, "one program": one_program}
        seconds = in_turn({k: lambda f=f: f(steps) for k, f in doors.items()}, pairs)  # noqa: B023
        for name, told in (("apart", "runs of fit"), ("one program", "of one compiled program")):
            what = f"speed of fit_grid over {len(RATES)} {told}, {steps:,} steps, compiling"
            rows.append(Row(f"grid, {name}", what, ratios(seconds[name], seconds["grid"])))
    return rows
