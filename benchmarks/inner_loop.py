"""The inner loop is a scan: many steps compile as fast as few.

So does the training program, which beside it keeps the support loss of every inner step, to be
reported under a name of its own.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from eqxmeta._loop.chunk import Job, train_chunk
from eqxmeta._task.device_source import Sampled

from ._report import Row
from ._timing import paired
from ._workload import TASKS
from .loop import notebook_model, notebook_tasks
from .meta_gradient import regression


def compile_gradient(strategy, model, tasks):
    """The meta-gradient alone, of the query loss of the mean task."""

    def meta_loss(params, static, task):
        adapted = strategy.inner_adapt(eqx.combine(params, static), task.support)
        return strategy.loss(adapted, task.query, None)[0]

    params, static = eqx.partition(model, eqx.is_inexact_array)

    def gradient(params, tasks):
        return jax.vmap(lambda task: jax.grad(meta_loss)(params, static, task))(tasks)

    jax.jit(gradient).lower(params, tasks).compile()


def compile_training(strategy, model, tasks):
    """What `Trainer.fit` compiles: tasks sampled, outer steps and their metrics, in a loop."""
    source, zero = Sampled(notebook_tasks(), TASKS), jnp.int32(0)
    job = Job(strategy, source, jax.random.key(0), zero, zero)
    train_chunk.lower(job, strategy.init(model)).compile()


def run(pairs, quick):
    many, few = (16, 2) if quick else (512, 2)
    model, tasks = notebook_model(), regression(1, 1, 32)

    def compiling(steps, compile_it):
        def run():
            # A new function each time: of one that it knows JAX would take the traced program.
            def loss(*args):
                return em.losses.mse(*args)

            inner = em.InnerLoop(optax.sgd(0.01), steps)
            strategy = em.MAML(loss, inner, optax.adam(1e-3), task_chunk=None)
            compile_it(strategy, model, tasks)

        return run

    rows = []
    for target, of, compile_it in (
        ("inner loop, compile", "the meta-gradient", compile_gradient),
        ("inner loop, reported", "training, a metric for each step", compile_training),
    ):
        other = {"few": compiling(few, compile_it)}
        ratio = paired(compiling(many, compile_it), other, pairs)["few"]
        what = f"time to compile {many} inner steps over {few}: {of}"
        rows.append(Row(target, what, ratio))
    return rows
