"""Few-shot classification of Omniglot characters: a recipe for each algorithm, ten minutes.

    python examples/omniglot.py --data omniglot28.npz --algorithm ProtoNet --shots 5

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
from eqxmeta.callbacks import JSONL, Checkpoint, Evaluate, Histograms, ProgressBar, TensorBoard


class Network(eqx.Module):
    """Four blocks of 3x3 convolution, normalisation over one example and ReLU, each of which halves
    the image; then a linear head, or none for ProtoNet. [28, 28] -> [ways] or [4 * width]."""

    blocks: list
    head: eqx.nn.Linear | eqx.nn.Identity

    def __init__(self, ways, width, key):
        *keys, head_key = jax.random.split(key, 5)
        draws = zip(keys, [9, *3 * [9 * width]], strict=True)  # 3 x 3 pixels of each channel
        self.blocks = [jax.random.normal(k, (n, width)) * np.sqrt(2 / n) for k, n in draws]
        self.head = eqx.nn.Linear(4 * width, ways, key=head_key) if ways else eqx.nn.Identity()

    def __call__(self, image):
        x = image[:, :, None]
        for weight in self.blocks:  # as patches and one product: fast under weights of each task
            h, w, _ = x.shape
            x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
            shifted = [x[i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
            x = jax.nn.relu(
                jax.nn.standardize(jnp.concatenate(shifted, axis=-1) @ weight, (0, 1, 2))
            )
        return self.head(x.ravel())


def episodes(data, split, ways, shots, queries):
    images = data["images"][data["vinyals"] == split]
    images = np.concatenate([np.rot90(images, turns, axes=(2, 3)) for turns in range(4)])
    labels = np.repeat(np.arange(len(images)), images.shape[1])
    return em.tasks.Episodes(images.reshape(-1, 28, 28), labels, ways, shots, queries)


def recipe(name, steps):
    """The strategy, and the number of inner steps at test."""
    loss, adam = em.losses.cross_entropy, optax.adam(1e-3)
    descent = em.InnerLoop(optax.sgd(0.4), steps=1)  # the rate of Finn et al. 2017, a mean loss
    if name == "MetaSGD":  # rates of 0.4 to begin with, all of them learnt
        return em.MetaSGD(loss, em.InnerLoop(optax.sgd(1.0), steps=1), adam, rate=0.4), 3
    if name == "ANIL":  # the head alone, on features that stay: five steps cost what one does
        return em.ANIL(loss, em.InnerLoop(optax.sgd(0.4), steps=5), adam), 5
    if name == "Reptile":  # Nichol et al. 2018, table 4: Adam without momentum, 1 annealed to 0
        inner = em.InnerLoop(optax.adam(1e-3, b1=0), steps=5)
        annealed = optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
        return em.Reptile(loss, inner, annealed, batch_size=10), 50
    if name == "ProtoNet":  # Snell et al. 2017: the rate halved every 2,000 steps; no inner loop
        halving = optax.exponential_decay(1e-3, 2_000, 0.5, staircase=True)
        return em.ProtoNet(loss, optax.adam(halving)), None
    return {"MAML": em.MAML, "FOMAML": em.FOMAML}[name](loss, descent, adam), 3


def main():
    parser = argparse.ArgumentParser(description="Few-shot classification of Omniglot.")
    names = ["MAML", "FOMAML", "Reptile", "MetaSGD", "ANIL", "ProtoNet"]
    parser.add_argument("--algorithm", choices=names, default="MAML")
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz")
    parser.add_argument("--ways", type=int, default=5, help="classes of a task")
    parser.add_argument("--train-ways", type=int, help="if others; of ProtoNet 60")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--width", type=int, default=32, help="channels")
    parser.add_argument("--steps", type=int, default=40_000, help="outer steps, at most")
    parser.add_argument("--minutes", type=float, default=10, help="of training, at most")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    args = parser.parse_args()
    name, out = args.algorithm, args.out / args.algorithm.lower()
    strategy, inner_steps = recipe(name, args.steps)
    train_ways = args.train_ways or (60 if name == "ProtoNet" else args.ways)
    queries = 10 - args.shots if name == "Reptile" else 5  # it pools them: ten examples a class
    with np.load(args.data) as data:
        train = episodes(data, "train", train_ways, args.shots, queries)
        val, test = (episodes(data, s, args.ways, args.shots, queries=15) for s in ("val", "test"))

    every, val_tasks = max(1, min(500, args.steps // 2)), min(200, args.test_tasks)
    callbacks = [
        ProgressBar(),
        TensorBoard(out / "tensorboard"),
        JSONL(out / "metrics.jsonl"),
        Histograms(every=every),  # of Meta-SGD's rates, for one
        Evaluate(val, every=every, num_tasks=val_tasks, inner_steps=inner_steps, prefix="val"),
        best := Checkpoint(out / "checkpoints", every=every, monitor="val/accuracy", mode="max"),
    ]
    meta_batch = {"ProtoNet": 1, "Reptile": 5}.get(name, 8)
    options = {"meta_batch_size": meta_batch, "max_time": 60 * args.minutes}
    trainer = em.Trainer(strategy, callbacks=callbacks, **options)
    model = Network(None if name == "ProtoNet" else args.ways, args.width, jax.random.key(0))
    state = trainer.fit(model, train, args.steps, resume="auto")

    state = em.load(best.best_path, state) if best.best_path else state
    options = {"num_tasks": args.test_tasks, "inner_steps": inner_steps, "seed": 1}
    result = em.evaluate(strategy, state.model, test, **options)
    mean, ci95 = 100 * result.mean("accuracy")[-1], 100 * result.ci95("accuracy")[-1]
    print(f"\n{name}, {args.ways}-way {args.shots}-shot, checkpoint of step {int(state.step):,}")
    print(f"test accuracy {mean:.2f} ± {ci95:.2f} % over {args.test_tasks} tasks")


if __name__ == "__main__":
    main()
