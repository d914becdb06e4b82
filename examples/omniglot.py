"""MAML on Omniglot, 5-way 1-shot: real characters, a small convolutional network, ten minutes.

    python examples/omniglot.py --data omniglot28.npz

The file holds `images`, uint8 [1623, 20, 28, 28], and `vinyals`, the split of each character into
train, val and test (Vinyals et al. 2016). Each character turned by 90, 180 and 270 degrees is a
class of its own; no character is in two splits.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Evaluate, ProgressBar, TensorBoard


class Block(eqx.Module):
    """3x3 convolution of stride 2, normalisation over one example, ReLU.

    [height, width, inputs] -> [height / 2, width / 2, outputs].

    The convolution is written as patches and one matrix product: every task has weights of its
    own, and a product with batched weights is what a CPU does fast inside a compiled loop.
    """

    weight: jax.Array
    scale: jax.Array
    shift: jax.Array

    def __init__(self, inputs, outputs, key):
        self.weight = jax.random.normal(key, (9 * inputs, outputs)) * np.sqrt(2 / (9 * inputs))
        self.scale, self.shift = jnp.ones((1, 1, outputs)), jnp.zeros((1, 1, outputs))

    def __call__(self, x):
        height, width, _ = x.shape
        x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
        shifted = [x[i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
        x = jnp.concatenate(shifted, axis=-1) @ self.weight
        x = x - jnp.mean(x, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, keepdims=True) + 1e-5)
        return jax.nn.relu(x * self.scale + self.shift)


class Network(eqx.Module):
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, ways, width, key):
        *keys, head_key = jax.random.split(key, 5)
        self.blocks = [Block(width if i else 1, width, k) for i, k in enumerate(keys)]
        self.head = eqx.nn.Linear(4 * width, ways, key=head_key)

    def __call__(self, image):
        x = image[:, :, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x.ravel())


def episodes(data, split, ways, shots, queries):
    images = data["images"][data["vinyals"] == split]
    images = np.concatenate([np.rot90(images, turns, axes=(2, 3)) for turns in range(4)])
    labels = np.repeat(np.arange(len(images)), images.shape[1])
    return em.tasks.Episodes(images.reshape(-1, 28, 28), labels, ways, shots, queries)


def main():
    parser = argparse.ArgumentParser(description="MAML on Omniglot.")
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--width", type=int, default=32, help="channels")
    parser.add_argument("--steps", type=int, default=40_000, help="outer steps, at most")
    parser.add_argument("--minutes", type=float, default=10, help="of training, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    args = parser.parse_args()

    with np.load(args.data) as data:
        train = episodes(data, "train", args.ways, args.shots, queries=5)
        val = episodes(data, "val", args.ways, args.shots, queries=5)
        test = episodes(data, "test", args.ways, args.shots, queries=15)

    inner = em.InnerLoop(optax.sgd(0.4), steps=1)
    strategy = em.MAML(em.losses.cross_entropy, inner, optax.adam(1e-3))
    every = max(1, min(500, args.steps // 2))
    monitor = "val/accuracy/after_1"
    callbacks = [
        ProgressBar(),
        TensorBoard(args.out / "tensorboard"),
        JSONL(args.out / "metrics.jsonl"),
        Evaluate(val, every=every, num_tasks=200, inner_steps=3, prefix="val"),
        best := Checkpoint(args.out / "checkpoints", every=every, monitor=monitor, mode="max"),
    ]
    limit = 60 * args.minutes
    trainer = em.Trainer(strategy, meta_batch_size=8, callbacks=callbacks, max_time=limit)
    model = Network(args.ways, args.width, jax.random.key(0))
    state = trainer.fit(model, train, args.steps, resume="auto")

    if best.best_path is not None:
        state = em.load(best.best_path, state)
    result = em.evaluate(strategy, state.model, test, num_tasks=600, inner_steps=3, seed=1)
    mean, ci95 = 100 * result.mean("accuracy"), 100 * result.ci95("accuracy")
    print(f"\n{args.ways}-way {args.shots}-shot, checkpoint of step {int(state.step):,}")
    for k in range(4):
        print(
            f"test accuracy after {k} inner steps: {mean[k]:.1f} ± {ci95[k]:.1f} % over 600 tasks"
        )


if __name__ == "__main__":
    main()
