"""Few-shot classification of Omniglot characters: a recipe for each algorithm.

    python examples/omniglot.py --data omniglot28.npz --algorithm ProtoNet --shots 5

The file holds `images`, uint8 [1623, 20, 28, 28], and `vinyals`, the split of each character into
train, val and test (Vinyals et al. 2016). Each character turned by 90, 180 and 270 degrees is a
class of its own; no character is in two splits.
"""

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    Checkpoint,
    Confusion,
    Evaluate,
    Histograms,
    ProgressBar,
    TensorBoard,
)


def episodes(root, split, ways, shots, queries):
    data = em.data.omniglot(root, split)
    return em.tasks.Episodes(data.images, data.labels, ways, shots, queries, rotations=True)


def recipes(steps, features=64, batches=None):
    """The strategy, the number of inner steps at test, and the tasks of an outer step. `features`
    of an image: the width of Conv4. `batches`: for those that are trained on all classes at once.
    """
    loss = em.losses.cross_entropy

    def annealed(rate):  # so that a short run is enough
        return optax.adam(optax.cosine_decay_schedule(rate, steps))

    adam, slow = annealed(3e-3), annealed(1e-3)

    def descent(rate, steps=1):
        return em.InnerLoop(optax.sgd(rate), steps)

    one = descent(0.4)  # the rate of Finn et al. 2017, a mean loss
    # Two steps; both losses count at first, without second derivatives.
    phases = {"anneal": steps // 4, "first_order": steps // 8}

    def network(params):
        return em.rules.UpdateNetwork(key=jax.random.key(1))

    def head(model):
        return model.head.weight, model.head.bias

    head_of_all: dict[str, Any] = {"features": features}
    center = None
    if batches is not None:
        head_of_all["classes"] = batches.num_classes
        center, _ = batches.sample(jax.random.key(1)).query  # of whose features there is a mean
    decayed = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.01, momentum=0.9))
    new_head = em.InnerLoop(decayed, steps=100)  # the rates of Chen et al. 2019
    relation = eqx.nn.MLP(2 * features, "scalar", 64, 1, key=jax.random.key(1))
    to_zero = optax.sgd(optax.linear_schedule(1.0, 0.0, steps))  # Nichol et al. 2018, table 4
    return {
        "MAML": (em.MAML(loss, one, adam), 3, 8),
        "MAMLPlusPlus": (em.MAMLPlusPlus(loss, descent(0.4, 2), adam, **phases), 3, 8),
        # Rates of 0.4 to begin with, all of them learnt.
        "MetaSGD": (em.MetaSGD(loss, descent(1.0), adam, rate=0.4), 3, 4),
        "MetaCurvature": (em.MetaCurvature(loss, one, adam), 3, 8),
        "TNet": (em.TNet(loss, one, adam), 3, 8),
        "LearntUpdate": (em.LearntUpdate(loss, one, adam, rule=network), 3, 8),
        "BOIL": (em.BOIL(loss, one, adam), 3, 8),
        # The head alone (rate: Raghu et al. 2020); steps on features cost nothing.
        "ANIL": (em.ANIL(loss, descent(0.1, 5), annealed(2e-3)), 30, 8),
        # The context is the head: it begins at zero in every task.
        "CAVIA": (em.CAVIA(loss, descent(1.0, 5), adam, context=head), 5, 8),
        "ProtoMAML": (em.ProtoMAML(loss, descent(0.1), adam), 3, 8),
        "ProtoNet": (em.ProtoNet(loss, slow), None, 1),
        "ProtoNet-cosine": (em.ProtoNet(loss, annealed(2e-3), distance="cosine"), None, 1),
        "MatchingNet": (em.MatchingNet(loss, annealed(2e-3)), None, 1),
        "RelationNet": (em.RelationNet(loss, annealed(2e-3), relation=relation), None, 1),
        "R2D2": (em.R2D2(loss, adam), None, 1),
        "MetaOptNet": (em.MetaOptNet(loss, adam), None, 1),
        # Trained on all classes at once, in minibatches.
        "Baseline": (em.Baseline(loss, new_head, slow, **head_of_all), None, 1),
        "BaselinePlusPlus": (em.BaselinePlusPlus(loss, new_head, slow, **head_of_all), None, 1),
        "SimpleShot": (em.SimpleShot(loss, slow, center=center, **head_of_all), None, 1),
        # λ, inner and conjugate gradient steps: Rajeswaran et al. 2019, section 5.
        "IMAML": (em.IMAML(loss, descent(0.1, 16), adam, strength=2.0), 16, 8),
        # Without second derivatives small steps do better, and plain descent than Adam.
        "FOMAML": (em.FOMAML(loss, descent(0.1, 5), adam), 20, 4),
        "Reptile": (em.Reptile(loss, descent(0.1, 5), to_zero, batch_size=10), 20, 5),
    }


def prepare(name, data, steps, ways=5, shots=1, width=64, train_ways=None, seed=0):
    """The recipe of that name, its network, and the tasks that are trained on, that choose the
    checkpoint, and that are reported."""
    batches = None
    if name in ("Baseline", "BaselinePlusPlus", "SimpleShot"):
        characters = em.data.omniglot(data, "train")
        batches = em.tasks.Minibatches(characters, batch_size=64, rotations=True)
    recipe = recipes(steps, width, batches)[name]
    _, inner_steps, meta_batch = recipe
    train_ways = train_ways or (30 if meta_batch == 1 else ways)
    # Reptile pools support and query: ten examples a class, of the twenty that there are.
    queries = max(10 - shots, 5) if name == "Reptile" else 5
    train = batches or episodes(data, "train", train_ways, shots, queries)
    queries = min(15, 20 - shots)
    val, test = (episodes(data, split, ways, shots, queries) for split in ("val", "test"))
    # What classifies by features, or makes its head of them, has no inner steps, but for one.
    outputs = None if inner_steps is None or name == "ProtoMAML" else ways
    model = em.nn.Conv4(1, outputs, width=width, key=jax.random.key(seed))
    return recipe, model, (train, val, test)


def main():
    parser = argparse.ArgumentParser(description="Few-shot classification of Omniglot.")
    parser.add_argument("--algorithm", choices=recipes(1), default="MAML")
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz")
    parser.add_argument("--ways", type=int, default=5, help="classes of a task")
    parser.add_argument("--train-ways", type=int, help="if others; with one task a step 30")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--width", type=int, default=64, help="channels")
    parser.add_argument("--steps", type=int, default=4_000, help="outer steps")
    parser.add_argument("--minutes", type=float, default=30, help="of training, at most")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    args = parser.parse_args()
    # What took more than a second to compile is found there by the next start.
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    name, out = args.algorithm, args.out / args.algorithm.lower()
    settings = args.data, args.steps, args.ways, args.shots, args.width, args.train_ways
    recipe, model, (train, val, test) = prepare(name, *settings)
    strategy, inner_steps, meta_batch = recipe

    every, val_tasks = max(1, min(500, args.steps // 2)), min(200, args.test_tasks)
    callbacks = [
        ProgressBar(),
        TensorBoard(out / "tensorboard"),
        JSONL(out / "metrics.jsonl"),
        Histograms(every=every),  # of Meta-SGD's rates, for one
        Evaluate(val, every=every, num_tasks=val_tasks, inner_steps=inner_steps, prefix="val"),
        Confusion(val, every=every, inner_steps=inner_steps),
        best := Checkpoint(out / "checkpoints", every=every, monitor="val/accuracy"),
    ]
    options = {"meta_batch_size": meta_batch, "max_time": 60 * args.minutes}
    trainer = em.Trainer(strategy, callbacks=callbacks, **options)
    state = trainer.fit(model, train, args.steps, resume="auto")  # goes on where Ctrl-C stopped it
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)  # everything is saved; the shell shall know

    state = em.load(best.best_path, state) if best.best_path else state
    options = {"num_tasks": args.test_tasks, "inner_steps": inner_steps, "seed": 1}
    result = em.evaluate(strategy, state.model, test, **options)
    mean, ci95 = 100 * result.mean("accuracy")[-1], 100 * result.ci95("accuracy")[-1]
    print(f"\n{name}, {args.ways}-way {args.shots}-shot, checkpoint of step {int(state.step):,}")
    print(f"test accuracy {mean:.2f} ± {ci95:.2f} % over {args.test_tasks} tasks")


if __name__ == "__main__":
    main()
