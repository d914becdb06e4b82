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


class WithContext(eqx.Module):  # for CAVIA: eight more inputs, which alone adapt
    context: jax.Array
    layers: eqx.nn.MLP

    def __call__(self, x):
        return self.layers(jnp.concatenate([x, self.context]))


MLP = eqx.nn.MLP(9, 1, width_size=40, depth=2, key=jax.random.key(0))
BODY = eqx.nn.MLP(1, 40, 40, 1, final_activation=jax.nn.relu, key=jax.random.key(0))
NETWORKS = {"CAVIA": em.nn.fast(WithContext(jnp.zeros(8), MLP)), "R2D2": em.nn.fast(BODY)}


class OneSine(eqx.Module):
    """A task source of one's own: anything with `sample(key)`. This one knows a single task."""

    task: em.Task

    def sample(self, key):
        return self.task


def recipes(steps):
    """The first five at the MAML paper's rates, the others at the best of a few."""
    mse, adam = em.losses.mse, optax.adam(1e-3)
    to_zero, cosine = optax.linear_schedule(1.0, 0.0, steps), optax.cosine_decay_schedule
    annealed, faster = (optax.adam(cosine(rate, steps)) for rate in (3e-3, 5e-3))
    small, middle, large, unit = (em.InnerLoop(optax.sgd(r), 1) for r in (0.01, 0.03, 0.05, 1.0))
    five, many = em.InnerLoop(optax.sgd(0.02), 5), em.InnerLoop(optax.sgd(0.002), 100)

    def network(params):
        return em.rules.UpdateNetwork(key=jax.random.key(1))

    plain = em.Joint, em.MAML, em.FOMAML, em.ANIL, em.BOIL
    return {algorithm.__name__: algorithm(mse, small, adam) for algorithm in plain} | {
        "Reptile": em.Reptile(mse, five, optax.sgd(to_zero), batch_size=10),
        # Smaller inner rates for longer runs: nothing keeps the curvature where they can follow.
        "IMAML": em.IMAML(mse, many, optax.adam(cosine(1e-3, steps)), strength=2.0),
        "TNet": em.TNet(mse, large, annealed),
        "LearntUpdate": em.LearntUpdate(mse, middle, annealed, rule=network),
        "MAMLPlusPlus": em.MAMLPlusPlus(mse, large, annealed),
        "MetaSGD": em.MetaSGD(mse, unit, annealed, rate=0.05),
        "MetaCurvature": em.MetaCurvature(mse, small, faster),
        "CAVIA": em.CAVIA(mse, unit, annealed),
        "R2D2": em.R2D2(mse, annealed),  # its one step is the ridge regression
    }


def sources(shots):
    """Tasks to train on, and to measure on."""
    return (em.tasks.Sinusoid(shots, queries, phase=(0.0, math.pi)) for queries in (10, 50))


def train(strategy, model, tasks, test, steps, folder, meta_batch_size=25):
    """`strategy`, and the model that, of those saved, did best on 600 tasks kept for that."""
    every, inner_steps = max(1, steps // 20), strategy.num_inner_steps()
    trained_for = f"eval/loss/after_{inner_steps}" if inner_steps else "eval/loss"
    logs = [ProgressBar(), TensorBoard(folder / "tensorboard"), JSONL(folder / "metrics.jsonl")]
    picture = AdaptationPlot(test, folder / "adaptation.png")
    most = inner_steps and max(inner_steps, 10)
    checkpoint = Checkpoint(folder / "checkpoints", every=every, monitor=trained_for)
    callbacks = [*logs, Evaluate(test, every=every, inner_steps=most), picture, checkpoint]
    trainer = em.Trainer(strategy, meta_batch_size=meta_batch_size, callbacks=callbacks)
    state = trainer.fit(model, tasks, steps, resume="auto")  # goes on where Ctrl-C stopped it
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)  # everything is saved; the shell shall know
    return strategy, em.load_model(checkpoint.best_path or "", state.model)


def overfit_one_sine(steps):
    """The network is no obstacle: a single sine it learns."""
    sine = OneSine(em.tasks.Sinusoid(shots=50, queries=50).sample(jax.random.key(7)))
    trainer = em.Trainer(recipes(steps)["Joint"], meta_batch_size=1, summary=False)
    models = NETWORK, trainer.fit(NETWORK, sine, steps).model
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)
    before, after = (em.losses.mse(model, sine.task.query, None)[0] for model in models)
    print(f"one sine: MSE {before:.2f} before, {after:.4f} after {steps:,} steps of Adam\n")


def report(learners, test, folder):
    print(f"\nMSE over 600 new tasks after {REPORTED} inner steps, ± 95% interval")
    for name, (strategy, model) in learners.items():
        longest = strategy.num_inner_steps() and 10
        result = em.evaluate(strategy, model, test, inner_steps=longest, seed=1)
        measured = list(zip(result.mean(), result.ci95(), strict=True))
        cells = ("{:8.4f} ± {:.4f}".format(*measured[k]) for k in REPORTED if k < len(measured))
        print(f"{name:16}" + "".join(cells))
    # Two references: predicting zero, and E[y | x], the best that does not look at the task.
    x, y = jax.vmap(test.sample)(jax.random.split(jax.random.key(1), 5_000)).query
    waves = jnp.sin(x - jnp.linspace(test.phase[0], test.phase[1], 257)[:-1])
    blind = sum(test.amplitude) / 2 * jnp.mean(waves, axis=-1, keepdims=True)
    print(f"{'zero':16}{jnp.mean(y**2):8.3f}\n{'task-blind':16}{jnp.mean((y - blind) ** 2):8.3f}")
    em.plot_adaptation(learners, test, num_tasks=2).savefig(folder / "adaptation.png")
    print(f"\nfigure: {folder}/adaptation.png    logs: tensorboard --logdir {folder}")


def compare(names, shots, steps, folder):
    tasks, test = sources(shots)

    def learner(name):
        strategy, model = recipes(steps)[name], NETWORKS.get(name, NETWORK)
        return train(strategy, model, tasks, test, steps, folder / name.lower())

    report({name: learner(name) for name in names}, test, folder)


def reptile_paper(steps, folder):
    """Nichol et al. 2018: every phase, tanh, 10 tasks a step, batches of 10 of 50 points."""
    model = em.nn.fast(eqx.nn.MLP(1, 1, 64, 2, activation=jnp.tanh, key=jax.random.key(0)))
    tasks, test = em.tasks.Sinusoid(shots=10, queries=40), em.tasks.Sinusoid(10, queries=100)
    options = model, tasks, test, steps, folder, 10
    report({"Reptile": train(recipes(steps)["Reptile"], *options)}, test, folder)


def main():
    parser = argparse.ArgumentParser(description="Few-shot regression of sine waves.")
    parser.add_argument("--paper", action="store_true", help="5 and 10 shots, 70,000 outer steps")
    every = [name for name in recipes(1) if name != "Reptile"]
    parser.add_argument("--all", nargs="*", metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--steps", type=int, help="outer steps, instead of the recipe's number")
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))  # for the next start
    if args.paper:
        for shots in (5, 10):
            compare(every[:3], shots, args.steps or 70_000, args.out / f"paper-{shots}-shot")
        reptile_paper(args.steps or 30_000, args.out / "paper-reptile")
    elif args.all is not None:
        compare(args.all or every, 10, args.steps or 20_000, args.out / "all")
    else:
        overfit_one_sine(args.steps or 5_000)
        compare([*every[:3], "Reptile"], 10, args.steps or 10_000, args.out)


if __name__ == "__main__":
    main()
