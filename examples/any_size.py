"""One ProtoNet for tasks of any size, beside two that are trained on tasks of one size each.

    python examples/any_size.py --data omniglot28.npz

All three take the same number of outer steps. They are evaluated on the same test tasks, 5-way
1-shot and 20-way 5-shot, and compared by the difference in each task. `examples/omniglot.py` says
what the file holds.
"""

import argparse
from pathlib import Path

import jax
import optax

import eqxmeta as em


def main():
    parser = argparse.ArgumentParser(description="ProtoNet on tasks of several sizes.")
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz")
    parser.add_argument("--steps", type=int, default=700, help="outer steps")
    parser.add_argument("--width", type=int, default=32, help="channels")
    parser.add_argument("--test-tasks", type=int, default=600)
    args = parser.parse_args()

    def episodes(split, ways, shots):
        images = em.data.omniglot(args.data, split)
        sizes = {"ways": ways, "shots": shots, "queries": 5}
        return em.tasks.Episodes(images, **sizes, rotations=True)

    adam = optax.adam(optax.cosine_decay_schedule(1e-3, args.steps))
    strategy = em.ProtoNet(em.losses.cross_entropy, adam)
    trainer = em.Trainer(strategy, meta_batch_size=1, summary=False)
    model = em.nn.Conv4(1, None, width=args.width, key=jax.random.key(0))
    trained = {}
    # Of the first each task draws its own numbers, within one program.
    for ways, shots in (((5, 20), (1, 5)), (20, 5), (5, 1)):
        name = f"trained on ways={ways}, shots={shots}"
        trained[name] = trainer.fit(model, episodes("train", ways, shots), args.steps).model

    for ways, shots in ((5, 1), (20, 5)):
        test = episodes("test", ways, shots)
        print(f"\n{ways}-way {shots}-shot, {args.test_tasks} test tasks:")
        any_size, *others = (
            em.evaluate(strategy, model, test, num_tasks=args.test_tasks, seed=1)
            for model in trained.values()
        )
        for name, result in zip(trained, (any_size, *others), strict=True):
            mean, ci95 = (100 * x("accuracy")[-1] for x in (result.mean, result.ci95))
            print(f"{mean:.2f} ± {ci95:.2f} % {name}")
        for name, result in zip(list(trained)[1:], others, strict=True):
            print(f"any size - {name}: {em.compare(any_size, result)}")


if __name__ == "__main__":
    main()
