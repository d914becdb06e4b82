"""`Trainer.fit` against a hand-written loop, on the founding notebook's MAML.

The hand-written loop is one `lax.scan` over all steps: tasks sampled on the device, meta-gradient
by plain reverse mode, nothing logged, nothing saved. `Trainer.fit` does the same arithmetic,
computes the query loss before adaptation and the gradient's norm as well, and with callbacks
writes every step's metrics. All are compiled beforehand.
"""

import contextlib
import io
import itertools
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, ProgressBar, TensorBoard

from ._report import Row
from ._timing import in_turn, ratios
from ._workload import INNER_RATE, OUTER_RATE, POINTS, TASKS


def sample(key):
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, minval=-jnp.pi, maxval=jnp.pi)
    x = jax.random.uniform(x_key, (2 * POINTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return (x[:POINTS], y[:POINTS]), (x[POINTS:], y[POINTS:])


def by_hand(model, steps):
    """The whole training as one function of a key."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.adam(OUTER_RATE)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    def task_loss(params, support, query):
        grads = jax.grad(loss)(params, support)
        return loss(jax.tree.map(lambda p, g: p - INNER_RATE * g, params, grads), query)

    def meta_loss(params, support, query):
        return jnp.mean(jax.vmap(task_loss, (None, 0, 0))(params, support, query))

    def step(carry, key):
        params, opt_state = carry
        support, query = jax.vmap(sample)(jax.random.split(key, TASKS))
        value, grads = jax.value_and_grad(meta_loss)(params, support, query)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def train(key):
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))

    return train


def notebook_model():
    return eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0))


def notebook_tasks():
    return em.tasks.Sinusoid(shots=POINTS, queries=POINTS)


def notebook_maml(mode="mixed", **options):
    inner = em.InnerLoop(optax.sgd(INNER_RATE), 1, mode)
    return em.MAML(em.losses.mse, inner, optax.adam(OUTER_RATE), **options)


def run(pairs, quick):
    steps = 50 if quick else 3_000
    plain, tasks, strategy = notebook_model(), notebook_tasks(), notebook_maml()
    models = {"eqx.nn.MLP": plain, "em.nn.fast": em.nn.fast(plain)}
    train = by_hand(plain, steps)
    numbers = itertools.count()

    with tempfile.TemporaryDirectory() as root:

        def fit(model, attached):
            folder = Path(root, str(next(numbers)))
            callbacks = [
                ProgressBar(disable=False),
                TensorBoard(folder / "tensorboard"),
                JSONL(folder / "metrics.jsonl"),
                Checkpoint(folder / "checkpoints", every=1000),
            ]
            trainer = em.Trainer(
                strategy, meta_batch_size=TASKS, callbacks=callbacks * attached, summary=False
            )
            with contextlib.redirect_stderr(io.StringIO()):
                return trainer.fit(model, tasks, steps)

        functions = {"scan": lambda: train(jax.random.key(0))}
        for name, model in models.items():
            functions[name, "all"] = lambda model=model: fit(model, True)
            functions[name, "no"] = lambda model=model: fit(model, False)
        seconds = in_turn(functions, pairs)

    rows = []
    for name in models:
        every, bare = seconds[name, "all"], seconds[name, "no"]
        for which, of in (("all callbacks", every), ("no callback", bare)):
            what = f"speed of fit, {name}, {which}, over a hand-written scan, eqx.nn.MLP"
            rows.append(Row(f"loop, {name}, {which}", what, ratios(seconds["scan"], of)))
        cost = [1e6 * (a - b) / steps for a, b in zip(every, bare, strict=True)]
        rows.append(Row(f"host cost, {name}", "µs a step that all callbacks add to fit", cost))
    return rows
