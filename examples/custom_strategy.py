"""A meta-algorithm of one's own: MAML whose inner steps adapt the last layer alone.

A subclass of `GradientStrategy` says how a model adapts; the outer step, tasks in parallel,
metrics, evaluation and checkpoints come with it.
"""

import argparse

import equinox as eqx
import jax
import optax

import eqxmeta as em


class LastLayerMAML(em.GradientStrategy):
    loss: em.Loss
    optimizer: optax.GradientTransformation
    rate: float = 0.01
    steps: int = 5

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        def support_loss(last):
            return self.loss(eqx.tree_at(lambda m: m.layers[-1], model, last), support, key)[0]

        last = model.layers[-1]
        for _ in range(self.steps):
            grads = eqx.filter_grad(support_loss)(last)
            last = eqx.apply_updates(last, jax.tree.map(lambda g: -self.rate * g, grads))
        return eqx.tree_at(lambda m: m.layers[-1], model, last)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5_000, help="outer steps")
    args = parser.parse_args()

    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
    strategy = LastLayerMAML(em.losses.mse, optax.adam(1e-3))
    state = em.Trainer(strategy, meta_batch_size=25).fit(model, tasks, args.steps)

    result = em.evaluate(strategy, state.model, tasks, num_tasks=600, seed=1)
    before, after = result.mean()
    print(f"MSE {before:.2f} before, {after:.2f} ± {result.ci95()[1]:.2f} after adapting")


if __name__ == "__main__":
    main()
