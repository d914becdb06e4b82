"""`Trainer.fit` against a hand-written loop, on the founding notebook's MAML.

The hand-written loop is one `lax.scan` over all steps: tasks sampled on the device, meta-gradient
by plain reverse mode, nothing logged, nothing saved. `Trainer.fit` does the same arithmetic,
computes the query loss before adaptation and the gradient's norm as well, and with callbacks
writes every step's metrics. All are compiled beforehand, except where the first step is timed.
"""

import contextlib
import io
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Lambda, ProgressBar, TensorBoard

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
    processes = 1 if quick else 5
    return _training(pairs, steps) + _first_step(processes) + [_imports(processes)]


def _training(pairs, steps):
    model, tasks = notebook_model(), notebook_tasks()
    train = by_hand(model, steps)
    numbers = itertools.count()

    with tempfile.TemporaryDirectory() as root:

        def fit(strategy, attached):
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
        for mode in ("reverse", "mixed"):
            strategy = notebook_maml(mode)
            functions[mode, "all"] = lambda strategy=strategy: fit(strategy, True)
            functions[mode, "no"] = lambda strategy=strategy: fit(strategy, False)
        seconds = in_turn(functions, pairs)

    rows = []
    for mode in ("reverse", "mixed"):
        every, bare = seconds[mode, "all"], seconds[mode, "no"]
        for which, of, asked in (("all callbacks", every, 1.1), ("no callback", bare, None)):
            what = f"speed of fit, {which}, over a hand-written scan"
            rows.append(Row(f"loop, {mode}, {which}", what, ratios(seconds["scan"], of), asked))
        cost = [1e6 * (a - b) / steps for a, b in zip(every, bare, strict=True)]
        rows.append(Row(f"host cost, {mode}", "µs a step that all callbacks add to fit", cost))
    return rows


def first_step(which):
    """Seconds to the loss of the first step, in a process that has compiled nothing yet."""
    model = notebook_model()
    ends = []
    if which == "fit":
        callback = Lambda(on_chunk_end=lambda run, metrics: ends.append(_now()))
        trainer = em.Trainer(
            notebook_maml(), meta_batch_size=TASKS, callbacks=[callback], summary=False
        )
        began = _now()
        trainer.fit(model, notebook_tasks(), 1)
    else:
        began = _now()
        jax.device_get(by_hand(model, 1)(jax.random.key(0)))
        ends.append(_now())
    return ends[0] - began


def _first_step(processes):
    code = "from benchmarks.loop import first_step; print(first_step({!r}))"
    scan, fit = [], []
    for _ in range(processes):
        scan.append(_fresh(code.format("scan")))
        fit.append(_fresh(code.format("fit")))
    what = "seconds to the first metrics, with compilation"
    return [
        Row("first step, fit", what, fit, note="absolute; fresh processes"),
        Row("first step, scan", what, scan, note="absolute; fresh processes"),
        Row("first step", "time of fit over the hand-written scan", ratios(fit, scan)),
    ]


def _imports(processes):
    code = (
        "import equinox, optax, time; began = time.perf_counter();"
        "import eqxmeta, eqxmeta.callbacks; print(time.perf_counter() - began)"
    )
    _fresh(code)  # bytecode
    seconds = [_fresh(code) for _ in range(processes)]
    what = "seconds that eqxmeta adds to equinox and optax"
    note = "absolute; fresh processes"
    return Row("import", what, seconds, asked=0.3, at_least=False, note=note)


def _fresh(code):
    """The number that `code` prints, in a new process."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def _now():
    return time.perf_counter()
