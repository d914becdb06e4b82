"""Few-shot classification of your own photographs, one folder a class: a recipe for each algorithm.

    python examples/photos.py FOLDER --algorithm ProtoNet --size 32

Some classes are trained on, some choose the checkpoint, and some are reported, beside the nearest
mean of raw pixels. `--body` takes the body out of a checkpoint, freezes it and learns the head.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Confusion, Evaluate, ProgressBar, TensorBoard


def recipes(steps, frozen):
    """The strategy, the number of inner steps at test, and the tasks of an outer step."""
    loss = em.losses.cross_entropy
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, steps))  # so that a short run is enough

    def head(model):
        model = getattr(model, "head", model)  # that of ProtoMAML is made in each task
        return model.weight, model.bias

    learn = head if frozen else None

    def descent(rate, steps, adapt=learn):
        return em.InnerLoop(optax.sgd(rate), steps, adapt=adapt)

    phases = {"anneal": steps // 4, "first_order": steps // 8}
    three, five = descent(0.1, 3), descent(0.1, 5)
    to_zero = optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
    return {
        "ProtoNet": (em.ProtoNet(loss, adam, learn=learn), None, 1),
        "MatchingNet": (em.MatchingNet(loss, adam, learn=learn), None, 1),
        "R2D2": (em.R2D2(loss, adam, learn=learn), None, 4),
        "MetaOptNet": (em.MetaOptNet(loss, adam, learn=learn), None, 4),
        "ProtoMAML": (em.ProtoMAML(loss, descent(0.01, 3), adam, learn=learn), 3, 4),
        "MAML": (em.MAML(loss, three, adam, learn=learn), 5, 4),
        "MAMLPlusPlus": (em.MAMLPlusPlus(loss, three, adam, learn=learn, **phases), 5, 4),
        "MetaSGD": (em.MetaSGD(loss, descent(1.0, 2), adam, rate=0.1, learn=learn), 3, 4),
        "MetaCurvature": (em.MetaCurvature(loss, three, adam, learn=learn), 5, 4),
        "TNet": (em.TNet(loss, three, adam, learn=learn), 5, 4),
        "IMAML": (em.IMAML(loss, descent(0.1, 16), adam, learn=learn), 16, 4),
        "FOMAML": (em.FOMAML(loss, five, adam, learn=learn), 10, 4),
        "ANIL": (em.ANIL(loss, descent(0.1, 5, None), adam, learn=learn), 20, 4),
        "BOIL": (em.BOIL(loss, descent(0.1, 3, None), adam, learn=learn), 5, 4),
        "CAVIA": (em.CAVIA(loss, descent(1.0, 5, None), adam, context=head, learn=learn), 5, 4),
        "Reptile": (em.Reptile(loss, five, to_zero, batch_size=10, learn=learn), 20, 4),
        "Joint": (em.Joint(loss, five, adam, learn=learn), 20, 4),
    }


def split(images):
    """Classes to train on, to choose the checkpoint by, and to report."""
    return images.at_least(20).split(0.7, 0.15, 0.15, seed=0)


def augmented(size):
    return [em.data.random_crop(padding=size // 8), em.data.random_flip]


def episodes(images, size, meta_batch, ways=5):
    """The tasks that are trained on, that choose the checkpoint, and that are reported: those of
    one example a class, and those of five."""
    train, val, test = split(images)
    train_ways = min(15, len(train.class_names)) if meta_batch == 1 else ways
    augment = augmented(size)
    tasks = em.tasks.Episodes(train, ways=train_ways, shots=2, queries=4, augment=augment)
    val = em.tasks.Episodes(val, ways=ways, shots=1, queries=10)
    return tasks, val, *(em.tasks.Episodes(test, ways=ways, shots=k, queries=10) for k in (1, 5))


def network(recipe, ways=5, backbone="Conv4", frozen=False, seed=0, **options):
    # What classifies by features, or makes its head of them, is given an embedding; of a frozen
    # body that is a linear map of the features.
    strategy, inner_steps, _ = recipe
    embedding = inner_steps is None or isinstance(strategy, em.ProtoMAML)
    outputs = (64 if frozen else None) if embedding else ways
    return getattr(em.nn, backbone)(3, outputs, key=jax.random.key(seed), **options)


def row(name, results):
    cells = [(100 * r.mean("accuracy")[-1], 100 * r.ci95("accuracy")[-1]) for r in results]
    return f"{name:20}" + "".join(f"{mean:5.1f} ± {half:.1f}   " for mean, half in cells)


def main():
    parser = argparse.ArgumentParser(description="Few-shot classification of photographs.")
    parser.add_argument("folder", type=Path, help="one folder of photographs a class")
    parser.add_argument("--algorithm", choices=recipes(1, False), default="ProtoNet")
    parser.add_argument("--backbone", choices=["Conv4", "ResNet12"], default="Conv4")
    parser.add_argument("--body", type=Path, help="a checkpoint whose body is taken and frozen")
    numbers = {"size": 32, "ways": 5, "width": 32, "steps": 1_500, "minutes": 10, "test-tasks": 600}
    for flag, number in numbers.items():  # pixels a side; classes of a task; channels of Conv4; ...
        parser.add_argument(f"--{flag}", type=int, default=number, help=f"{number:,}")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    name, size = args.algorithm, args.size
    out = args.out / f"{name.lower()}-{args.backbone.lower()}-{size}{'-frozen' * bool(args.body)}"
    recipe = recipes(args.steps, bool(args.body))[name]
    strategy, inner_steps, meta_batch = recipe

    images = em.data.from_folder(args.folder, size=size, mode="RGB")
    tasks, val, *tests = episodes(images, size, meta_batch, args.ways)
    options = {"size": size, "width": args.width} if args.backbone == "Conv4" else {}
    model = network(recipe, args.ways, args.backbone, bool(args.body), **options)
    if args.body:
        body = em.load_model(args.body, eqx.tree_at(lambda m: m.head, model, None))
        model = eqx.tree_at(lambda m: m.blocks, model, body.blocks)
    every, options = max(1, args.steps // 5), {"inner_steps": inner_steps}
    callbacks = [ProgressBar(), TensorBoard(out / "tensorboard"), JSONL(out / "metrics.jsonl")]
    callbacks += [Evaluate(val, every=every, num_tasks=200, prefix="val", **options)]
    callbacks += [Confusion(val, out / "confusion.png", num_tasks=50, **options)]
    callbacks += [best := Checkpoint(out / "checkpoints", every=every, monitor="val/accuracy")]
    limit = 60 * args.minutes
    trainer = em.Trainer(strategy, meta_batch_size=meta_batch, callbacks=callbacks, max_time=limit)
    state = trainer.fit(model, tasks, args.steps, resume="auto")  # goes on after Ctrl-C
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)  # everything is saved; the shell shall know

    state = em.load(best.best_path, state) if best.best_path else state
    fixed = {"num_tasks": args.test_tasks, "seed": 1}
    new = len(split(images)[2].class_names)
    print(f"\n{args.ways}-way, {new} new classes, step {int(state.step):,}:")
    print(f"{'':22}1-shot        5-shot")
    centroid, pixels = em.ProtoNet(em.losses.cross_entropy, optax.sgd(0.1)), eqx.nn.Identity()
    print(row("pixel centroid", [em.evaluate(centroid, pixels, t, **fixed) for t in tests]))
    print(row(name, [em.evaluate(strategy, state.model, t, **fixed, **options) for t in tests]))


if __name__ == "__main__":
    main()
