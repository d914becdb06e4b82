"""The founding notebook: few-shot regression of sine waves.

    python examples/sinusoid.py            four algorithms, same tasks, same budget: a minute
    python examples/sinusoid.py --paper    the settings of the MAML and Reptile papers

Ctrl-C stops it; the same command goes on where it stopped. Watch it with
`tensorboard --logdir runs/sinusoid` (pip install tensorboard).
"""

import argparse
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, AdaptationPlot, Checkpoint, Evaluate, ProgressBar, TensorBoard

REPORTED = [0, 1, 5, 10]  # inner steps at test


class OneSine(eqx.Module):
    """A task source of one's own: anything with `sample(key)`. This one knows a single task."""

    task: em.Task

    def sample(self, key):
        return self.task


def network():
    return eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0))


def recipe(name, steps):
    if name == "Reptile":
        towards_adapted = optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
        return em.Reptile(em.losses.mse, em.InnerLoop(optax.sgd(0.02), steps=5), towards_adapted)
    algorithm = {"Joint": em.Joint, "MAML": em.MAML, "FOMAML": em.FOMAML}[name]
    return algorithm(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(1e-3))


def train(strategy, tasks, test, steps, folder, model, meta_batch_size=25):
    every = max(1, steps // 10)
    callbacks = [
        ProgressBar(),
        TensorBoard(folder / "tensorboard"),
        JSONL(folder / "metrics.jsonl"),
        Evaluate(test, every=every, inner_steps=10),
        AdaptationPlot(test, folder / "adaptation.png"),
        Checkpoint(folder / "checkpoints", every=every, monitor="eval/loss"),
    ]
    trainer = em.Trainer(strategy, meta_batch_size=meta_batch_size, callbacks=callbacks)
    return trainer.fit(model, tasks, steps, resume="auto")


def overfit_one_sine(steps):
    """The network is no obstacle: a single sine it learns."""
    sine = OneSine(em.tasks.Sinusoid(shots=50, queries=50).sample(jax.random.key(7)))
    trainer = em.Trainer(recipe("Joint", steps), meta_batch_size=1, summary=False)
    state = trainer.fit(network(), sine, steps)
    before, after = (em.losses.mse(m, sine.task.query, None)[0] for m in (network(), state.model))
    print(f"one sine: MSE {before:.2f} before, {after:.4f} after {steps:,} steps of Adam\n")


def references(tasks):
    """MSE of predicting zero, and of the best predictor that does not look at the task, E[y|x]."""
    x, y = jax.vmap(tasks.sample)(jax.random.split(jax.random.key(1), 5_000)).query
    phases = jnp.linspace(*tasks.phase, 257)[:-1]
    blind = jnp.mean(jnp.asarray(tasks.amplitude)) * jnp.mean(
        jnp.sin(x - phases), -1, keepdims=True
    )
    return {"zero": float(jnp.mean(y**2)), "task-blind": float(jnp.mean((y - blind) ** 2))}


def table(results, tasks):
    print(f"\nMSE over 600 tasks after {REPORTED} inner steps, ± 95% interval")
    for name, result in results.items():
        cells = (f"{result.mean()[k]:8.3f} ± {result.ci95()[k]:.3f}" for k in REPORTED)
        print(f"{name:16}" + "".join(cells))
    for name, value in references(tasks).items():
        print(f"{name:16}{value:8.3f}")


def run(names, shots, steps, folder, phase=(0.0, math.pi)):
    tasks = em.tasks.Sinusoid(shots, queries=10, phase=phase)
    test = em.tasks.Sinusoid(shots, queries=50, phase=phase)
    results, learners = {}, {}
    for name in names:
        strategy = recipe(name, steps)
        state = train(strategy, tasks, test, steps, folder / name.lower(), network())
        results[name] = em.evaluate(strategy, state.model, test, inner_steps=10, seed=1)
        learners[name] = (strategy, state.model)
    em.plot_adaptation(learners, test, num_tasks=2).savefig(folder / "adaptation.png")
    table(results, test)
    print(f"\nfigure: {folder / 'adaptation.png'}    logs: tensorboard --logdir {folder}")


def reptile_paper(steps, folder):
    """Nichol et al. 2018, section 5.1: every phase, tanh, batches of 10 out of 50 points."""
    tasks = em.tasks.Sinusoid(shots=10, queries=40)
    test = em.tasks.Sinusoid(shots=10, queries=100)
    inner, outer = optax.sgd(0.02), optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
    strategy = em.Reptile(em.losses.mse, em.InnerLoop(inner, steps=5), outer, batch_size=10)
    model = eqx.nn.MLP(1, 1, 64, 2, activation=jnp.tanh, key=jax.random.key(0))
    state = train(strategy, tasks, test, steps, folder, model, meta_batch_size=10)
    table({"Reptile": em.evaluate(strategy, state.model, test, inner_steps=10, seed=1)}, test)


def main():
    parser = argparse.ArgumentParser(description="Few-shot regression of sine waves.")
    parser.add_argument("--paper", action="store_true", help="5 and 10 shots, 70,000 outer steps")
    parser.add_argument("--steps", type=int, help="outer steps, instead of the recipe's own number")
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"))
    args = parser.parse_args()
    if args.paper:
        for shots in (5, 10):
            print(f"\n{shots}-shot")
            run(
                ["Joint", "MAML", "FOMAML"],
                shots,
                args.steps or 70_000,
                args.out / f"paper-{shots}",
            )
        reptile_paper(args.steps or 30_000, args.out / "paper-reptile")
    else:
        overfit_one_sine(args.steps or 5_000)
        run(["Joint", "MAML", "FOMAML", "Reptile"], 10, args.steps or 10_000, args.out)


if __name__ == "__main__":
    main()
