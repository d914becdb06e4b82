"""The founding notebook: few-shot regression of sine waves.

python examples/sinusoid.py            four algorithms, same tasks, same budget: a minute
python examples/sinusoid.py --paper    the settings of the MAML and Reptile papers
python examples/sinusoid.py --all      all that descend a meta-gradient, or those named: 10 shots
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

NETWORK = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
REPORTED = [0, 1, 5, 10]  # inner steps at test
ALL = ["Joint", "MAML", "FOMAML", "ANIL", "BOIL", "MetaSGD", "MAMLPlusPlus", "MetaCurvature"]
ALL += ["TNet", "LearntUpdate"]


class OneSine(eqx.Module):
    """A task source of one's own: anything with `sample(key)`. This one knows a single task."""

    task: em.Task

    def sample(self, key):
        return self.task


def recipe(name, steps):
    if name == "Reptile":
        inner, outer = optax.sgd(0.02), optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
        return em.Reptile(em.losses.mse, em.InnerLoop(inner, steps=5), outer, batch_size=10)
    rate = optax.cosine_decay_schedule(1e-3, steps) if name == "MAMLPlusPlus" else 1e-3
    network = {"rule": lambda params: em.rules.UpdateNetwork(key=jax.random.key(1))}
    inner, more = em.InnerLoop(optax.sgd(0.01), 1), network if name == "LearntUpdate" else {}
    return getattr(em, name)(em.losses.mse, inner, optax.adam(rate), **more)


def train(strategy, model, tasks, test, steps, folder, meta_batch_size=25):
    """`strategy`, and the model that, of those saved, did best on 600 tasks kept for that."""
    every, trained_for = max(1, steps // 20), f"eval/loss/after_{strategy.inner.steps}"
    logs = [ProgressBar(), TensorBoard(folder / "tensorboard"), JSONL(folder / "metrics.jsonl")]
    picture = AdaptationPlot(test, folder / "adaptation.png")
    checkpoint = Checkpoint(folder / "checkpoints", every=every, monitor=trained_for)
    callbacks = [*logs, Evaluate(test, every=every, inner_steps=10), picture, checkpoint]
    trainer = em.Trainer(strategy, meta_batch_size=meta_batch_size, callbacks=callbacks)
    state = trainer.fit(model, tasks, steps, resume="auto")  # goes on where Ctrl-C stopped it
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)  # everything is saved; the shell shall know
    return strategy, em.load_model(checkpoint.best_path or "", state.model)


def overfit_one_sine(steps):
    """The network is no obstacle: a single sine it learns."""
    sine = OneSine(em.tasks.Sinusoid(shots=50, queries=50).sample(jax.random.key(7)))
    trainer = em.Trainer(recipe("Joint", steps), meta_batch_size=1, summary=False)
    models = NETWORK, trainer.fit(NETWORK, sine, steps).model
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)
    before, after = (em.losses.mse(model, sine.task.query, None)[0] for model in models)
    print(f"one sine: MSE {before:.2f} before, {after:.4f} after {steps:,} steps of Adam\n")


def report(learners, test, folder):
    print(f"\nMSE over 600 new tasks after {REPORTED} inner steps, ± 95% interval")
    for name, (strategy, model) in learners.items():
        result = em.evaluate(strategy, model, test, inner_steps=10, seed=1)
        cells = (f"{result.mean()[k]:8.3f} ± {result.ci95()[k]:.3f}" for k in REPORTED)
        print(f"{name:16}" + "".join(cells))
    # Two references: predicting zero, and E[y | x], the best that does not look at the task.
    x, y = jax.vmap(test.sample)(jax.random.split(jax.random.key(1), 5_000)).query
    waves = jnp.sin(x - jnp.linspace(test.phase[0], test.phase[1], 257)[:-1])
    blind = sum(test.amplitude) / 2 * jnp.mean(waves, axis=-1, keepdims=True)
    print(f"{'zero':16}{jnp.mean(y**2):8.3f}\n{'task-blind':16}{jnp.mean((y - blind) ** 2):8.3f}")
    em.plot_adaptation(learners, test, num_tasks=2).savefig(folder / "adaptation.png")
    print(f"\nfigure: {folder}/adaptation.png    logs: tensorboard --logdir {folder}")


def compare(names, shots, steps, folder):
    tasks, test = (em.tasks.Sinusoid(shots, queries, phase=(0.0, math.pi)) for queries in (10, 50))
    options = NETWORK, tasks, test, steps
    report({n: train(recipe(n, steps), *options, folder / n.lower()) for n in names}, test, folder)


def reptile_paper(steps, folder):
    """Nichol et al. 2018: every phase, tanh, 10 tasks a step, batches of 10 of 50 points."""
    model = em.nn.fast(eqx.nn.MLP(1, 1, 64, 2, activation=jnp.tanh, key=jax.random.key(0)))
    tasks, test = em.tasks.Sinusoid(shots=10, queries=40), em.tasks.Sinusoid(10, queries=100)
    learner = train(recipe("Reptile", steps), model, tasks, test, steps, folder, meta_batch_size=10)
    report({"Reptile": learner}, test, folder)


def main():
    parser = argparse.ArgumentParser(description="Few-shot regression of sine waves.")
    parser.add_argument("--paper", action="store_true", help="5 and 10 shots, 70,000 outer steps")
    parser.add_argument("--all", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--steps", type=int, help="outer steps, instead of the recipe's number")
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))  # for the next start
    if args.paper:
        for shots in (5, 10):
            compare(ALL[:3], shots, args.steps or 70_000, args.out / f"paper-{shots}-shot")
        reptile_paper(args.steps or 30_000, args.out / "paper-reptile")
    elif args.all is not None:
        compare(args.all or ALL, 10, args.steps or 20_000, args.out / "all")
    else:
        overfit_one_sine(args.steps or 5_000)
        compare([*ALL[:3], "Reptile"], 10, args.steps or 10_000, args.out)


if __name__ == "__main__":
    main()
