"""The trainer with every callback against a hand-written loop, on the founding notebook's MAML.

    python benchmarks/loop.py [--steps 20000] [--pairs 5]

The hand-written loop is one `lax.scan` over all steps: tasks sampled on the device, meta-gradient
by plain reverse mode, nothing logged, nothing saved. `Trainer.fit` does the same arithmetic
(`"reverse"`) or the same in forward-over-reverse order (`"mixed"`), computes the query loss before
adaptation and the gradient's norm as well, and writes every step's metrics. Both are compiled
beforehand and timed in turn in this process; `fit` is timed as a whole, less what `Evaluate` says
that evaluation took.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Evaluate, ProgressBar, TensorBoard

TASKS, POINTS, RATE = 16, 32, 0.01


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
    optimizer = optax.adam(1e-3)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    def task_loss(params, support, query):
        grads = jax.grad(loss)(params, support)
        return loss(jax.tree.map(lambda p, g: p - RATE * g, params, grads), query)

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


def main():
    parser = argparse.ArgumentParser(description="Trainer.fit against a hand-written scan.")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()

    model = eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0))
    tasks = em.tasks.Sinusoid(shots=POINTS, queries=POINTS)
    strategies = {
        mode: em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(RATE), 1, mode), optax.adam(1e-3))
        for mode in ("reverse", "mixed")
    }
    train = by_hand(model, args.steps)

    def scan():
        began = time.perf_counter()
        jax.block_until_ready(train(jax.random.key(0)))
        return time.perf_counter() - began

    def fit(mode, attached, steps=args.steps):
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
            folder, evaluation = Path(name), Evaluate(tasks, every=5000, inner_steps=10)
            callbacks = [
                ProgressBar(disable=False),
                TensorBoard(folder / "tensorboard"),
                JSONL(folder / "metrics.jsonl"),
                evaluation,
                Checkpoint(folder / "checkpoints", every=5000),
            ]
            trainer = em.Trainer(
                strategies[mode],
                meta_batch_size=TASKS,
                callbacks=callbacks * attached,
                summary=False,
            )
            began = time.perf_counter()
            jax.block_until_ready(trainer.fit(model, tasks, steps))
            return time.perf_counter() - began - evaluation.seconds

    scan()
    columns = [(mode, attached) for mode in strategies for attached in (True, False)]
    for mode, attached in columns:
        fit(mode, attached, steps=5000)
    ratios = {column: [] for column in columns}
    for pair in range(args.pairs):
        by_scan = scan()
        seconds = {column: fit(*column) for column in columns}
        for column in columns:
            ratios[column].append(by_scan / seconds[column])
        rates = ", ".join(f"{args.steps / s:,.0f}" for s in (by_scan, *seconds.values()))
        print(f"pair {pair + 1}, steps/s: {rates}", flush=True)
    print("\nfit, in times the speed of the scan: median (lowest to highest)")
    for (mode, attached), values in ratios.items():
        what = "all callbacks" if attached else "no callback"
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{mode:8} {what:14} {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
