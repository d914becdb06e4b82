"""The inner loop is a scan: many steps compile as fast as few."""

import optax

import eqxmeta as em

from ._report import Row
from ._step import compile_step
from ._timing import paired
from .loop import notebook_model
from .meta_gradient import regression


def run(pairs, quick):
    many, few = (16, 2) if quick else (512, 2)
    model, tasks = notebook_model(), regression(1, 1, 32)

    def compiling(steps):
        def run():
            # A new function each time: of one that it knows JAX would take the traced program.
            def loss(*args):
                return em.losses.mse(*args)

            inner = em.InnerLoop(optax.sgd(0.01), steps)
            strategy = em.MAML(loss, inner, optax.adam(1e-3), task_chunk=None)
            compile_step(strategy, model, tasks)

        return run

    ratio = paired(compiling(many), {"few": compiling(few)}, pairs)["few"]
    what = f"time to trace and compile {many} inner steps over {few}"
    return [Row("inner loop, compile", what, ratio, asked=1.2, at_least=False)]
