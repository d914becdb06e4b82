"""A bilevel problem of one task: which labels are wrong?

    python examples/reweighting.py --data omniglot28.npz

Data hyper-cleaning (Franceschi et al. 2017, arXiv 1703.01785): ten characters of Omniglot, a third
of the labels wrong, three clean drawings of each. The inner problem trains a linear classifier on
features of a ProtoNet; the outer one learns a weight for each example, and the weight decay.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import eqxmeta as em

CLASSES, SHOTS, CLEAN = 10, 10, 3  # drawings of each character; the other seven test


class Reweighting(em.GradientStrategy, em.RolloutStrategy):
    loss: em.Loss
    inner: em.InnerLoop
    optimizer: optax.GradientTransformation
    examples: int

    def meta_model(self, model):
        extra = {"weights": jnp.zeros(self.examples), "log_decay": jnp.log(0.01)}
        return em.MetaParameters(model, extra)

    def inner_rollout(self, model, support, **options):
        x, y, weight = support
        weight = weight * jax.nn.sigmoid(model.extra["weights"])
        decay = optax.add_decayed_weights(jnp.exp(model.extra["log_decay"]))
        rule = optax.chain(decay, self.inner.optimizer)
        return self.inner(self.loss, model.model, (x, y, weight), optimizer=rule, **options)


class Parts(eqx.Module):
    """One task, of which each outer step sees a random quarter of the training examples."""

    task: em.Task

    def sample(self, key):
        x, y, weight = self.task.support
        weight = weight * jax.random.bernoulli(key, 0.25, weight.shape)
        return em.Task((x, y, weight), self.task.query)


def problem(body, task, seed):
    """Training, clean and test examples; which labels are wrong; the training images."""
    rng = np.random.default_rng(seed)
    (images, true), (others, z_true) = task.support, task.query
    x, body = em.features(body, images)  # normalised by the training examples, then and now
    x, z = ((f - x.mean(0)) / (x.std(0) + 1e-3) for f in (x, jax.vmap(body)(others)))
    wrong = rng.permutation(len(x)) < len(x) // 3
    y = (true + jnp.asarray(wrong * rng.integers(1, CLASSES, len(x)))) % CLASSES
    clean = np.arange(len(z)) % SHOTS < CLEAN
    return (x, y), (z[clean], z_true[clean]), (z[~clean], z_true[~clean]), wrong, images


def draw(images, labels, order, wrong):
    axes = (figure := Figure((12, 3.4), layout="constrained")).subplots()
    axes.imshow(np.block([[images[i, 0] for i in row] for row in order]), cmap="gray")
    for (row, column), i in np.ndenumerate(order):
        axes.text(28 * column, 28 * row + 7, labels[i], color="C1" if wrong[i] else "C0")
    axes.set(title="from the least weight, with labels (orange: wrong)", xticks=[], yticks=[])
    figure.savefig("reweighting.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Which labels are wrong?")
    parser.add_argument("--data", required=True, help="omniglot28.npz")
    parser.add_argument("--seeds", type=int, default=10, help="2 or more")
    parser.add_argument("--steps", type=int, default=400, help="of training the features")
    args = parser.parse_args()
    training, held = (em.data.omniglot(args.data, split) for split in ("train", "test"))
    episodes = em.tasks.Episodes(training, ways=20, shots=2, queries=3, rotations=True)
    characters = em.tasks.Episodes(held, ways=CLASSES, shots=SHOTS, queries=20 - SHOTS)
    loss, rate = em.losses.cross_entropy, optax.cosine_decay_schedule(5e-3, args.steps)
    body = em.nn.Conv4(1, None, width=32, key=jax.random.key(0))
    protonet = em.Trainer(em.ProtoNet(loss, optax.adam(rate)), meta_batch_size=1)
    body = protonet.fit(body, episodes, args.steps).model
    inner = em.InnerLoop(optax.sgd(0.1, momentum=0.9), steps=50)
    strategy = Reweighting(loss, inner, optax.adam(0.1), CLASSES * SHOTS, learn=lambda m: ())
    trainer = em.Trainer(strategy, meta_batch_size=4, summary=False)
    head = jax.tree.map(jnp.zeros_like, eqx.nn.Linear(32, CLASSES, key=jax.random.key(0)))
    nll, rows = optax.softmax_cross_entropy_with_integer_labels, []
    every, fold = jnp.ones(CLASSES * SHOTS), np.arange(CLASSES * SHOTS) % 5
    for seed, key in enumerate(jax.random.split(jax.random.key(0), args.seeds)):
        (x, y), clean, test, wrong, images = problem(body, characters.sample(key), seed)
        learnt = trainer.fit(head, Parts(em.Task((x, y, every), clean)), 100).model
        weights = np.array(learnt.extra["weights"])
        equal = eqx.tree_at(lambda m: m.extra["weights"], learnt, every)  # with the learnt decay
        few = eqx.tree_at(lambda m: m.extra["weights"], learnt, every[: len(clean[1])])
        trained = {
            "every label, reweighted": strategy.inner_adapt(learnt, (x, y, every)),
            "every label": strategy.inner_adapt(equal, (x, y, every)),
            "the right labels": strategy.inner_adapt(equal, (x, y, jnp.float32(~wrong))),
            "the clean drawings": strategy.inner_adapt(few, (*clean, few.extra["weights"])),
        }
        parts = [strategy.inner_adapt(equal, (x, y, jnp.float32(fold != k))) for k in range(5)]
        held_out = np.array([nll(jax.vmap(part)(x), y) for part in parts])[fold, range(len(y))]
        by_clean = np.array(nll(jax.vmap(trained["the clean drawings"])(x), y))
        scores = {"weight": -weights, "cross-validated loss": held_out, "clean loss": by_clean}
        row = {f"accuracy, {k}": loss(m, test, None)[1]["accuracy"] for k, m in trained.items()}
        row |= {f"AUC, {k}": np.mean(s[wrong, None] > s[~wrong]) for k, s in scores.items()}
        rows.append(row)
        draw(images, y, np.argsort(weights).reshape(5, 20), wrong)
    result = em.Evaluation({name: np.array([[row[name]] for row in rows]) for name in rows[0]})
    for name in result.metrics:
        print(f"{name:36} {result.mean(name)[0]:.3f} ± {result.ci95(name)[0]:.3f}")


if __name__ == "__main__":
    main()
