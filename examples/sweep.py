"""MAML's two rates on sine waves: a grid of runs as one program, and the best by an evaluation.

python examples/sweep.py
"""

import argparse
import time

import equinox as eqx
import jax
import optax

import eqxmeta as em

GRID = {"outer": [3e-4, 1e-3, 3e-3, 1e-2], "inner": [0.003, 0.01, 0.03, 0.1]}


def trainer(outer, inner):
    """Of numbers that JAX traces, too: all runs are one program."""
    loop = em.InnerLoop(optax.sgd(inner), steps=1)
    strategy = em.MAML(em.losses.mse, loop, optax.adam(outer))
    return em.Trainer(strategy, meta_batch_size=25)


def main():
    parser = argparse.ArgumentParser(description="A sweep over two rates.")
    parser.add_argument("--steps", type=int, default=3_000, help="outer steps")
    args = parser.parse_args()
    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))

    began = time.monotonic()
    runs = em.fit_grid(trainer, model, tasks, args.steps, grid=GRID)
    print(f"{len(runs.names)} runs of {args.steps:,} steps: {time.monotonic() - began:.0f} s\n")
    board = em.leaderboard(runs.evaluate(tasks, seed=1))
    print(board)
    # Chosen among sixteen, the best looks better than it is: tasks of its own say how good it is.
    best = board.places[0].name
    result = em.evaluate(runs.strategy(best), runs.state(best).model, tasks, seed=2)
    print(f"\n{best}: MSE {result.mean()[-1]:.3f} ± {result.ci95()[-1]:.3f} on tasks of its own")


if __name__ == "__main__":
    main()
