"""ANIL computes the features of the support set once, not at every inner step.

Against the same filter, in the same loop, without the library taking out of the loop what does not
change in it: what is left then is what XLA does by itself.
"""

from unittest import mock

import jax
import optax

import eqxmeta as em
from eqxmeta._jaxpr.flops import count_flops
from eqxmeta._meta_gradient import inner_loop as _inner_loop

from ._report import Row
from ._step import compile_step
from ._timing import paired
from .layout import Network

WAYS, SHOTS, QUERIES, TASKS = 5, 5, 5, 4


def episodes():
    def batch(key, size):
        x = jax.random.uniform(key, (TASKS, size, 28, 28))
        return x, jax.numpy.broadcast_to(jax.numpy.arange(size) % WAYS, (TASKS, size))

    support, query = jax.random.split(jax.random.key(0))
    return em.Task(batch(support, WAYS * SHOTS), batch(query, WAYS * QUERIES))


def anil(steps, gradient):
    # A loss of its own each time: of one that it knows JAX would take the traced program.
    def loss(*args):
        return em.losses.cross_entropy(*args)

    inner = em.InnerLoop(optax.sgd(0.4), steps, gradient)
    return em.ANIL(loss, inner, optax.adam(1e-3), task_chunk=1)


def run(pairs, quick):
    model, tasks = Network(WAYS, 4 if quick else 32, jax.random.key(0)), episodes()
    rows = []
    for gradient in ("mixed", "reverse"):
        for steps in (2,) if quick else (5, 10):
            once, flops = _compiled(anil(steps, gradient), model, tasks)
            with mock.patch.object(_inner_loop, "hoist", lambda fun, varying, fixed: (fun, fixed)):
                again, more_flops = _compiled(anil(steps, gradient), model, tasks)
            ratio = paired(again.run, {"once": once.run}, pairs)["once"]
            rows.append(
                Row(
                    f"ANIL, {gradient}, {steps} steps",
                    "time of an outer step, features at every inner step over once",
                    ratio,
                    note=f"operations {more_flops / flops:.2f}, temporary memory "
                    f"{again.temp_bytes / once.temp_bytes:.2f} times; convnet of 32 channels, "
                    f"{WAYS}-way {SHOTS}-shot, {TASKS} tasks",
                )
            )
    return rows


def _compiled(strategy, model, tasks):
    def update(state, tasks):
        return strategy.outer_update(state, tasks, key=None)

    flops = count_flops(update, strategy.init(model), tasks)
    return compile_step(strategy, model, tasks), flops
