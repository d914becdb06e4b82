"""A meta-algorithm of one's own: the query loss after every inner step counts at first, and each
inner step has a rate that is learnt (in the manner of MAML++, Antoniou et al. 2019).

A subclass of `GradientStrategy` and `RolloutStrategy` says what is learnt, how a model adapts and
what is descended; the outer step, tasks in parallel, metrics, evaluation and checkpoints come with
them.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em


class EveryStepMAML(em.GradientStrategy, em.RolloutStrategy):
    loss: em.Loss
    inner: em.InnerLoop
    optimizer: optax.GradientTransformation
    anneal: int = 2_000  # outer steps until the last inner step alone counts

    def meta_model(self, model):  # every array of `extra` is learnt beside the model
        return em.MetaParameters(model, {"log_rates": jnp.zeros(self.inner.steps)})

    def inner_rollout(self, model, support, **options):
        rates = jnp.exp(model.extra["log_rates"])  # after the last step its rate goes on
        rated = optax.scale_by_schedule(lambda count: rates[jnp.minimum(count, rates.size - 1)])
        rule = optax.chain(self.inner.optimizer, rated)
        return self.inner(self.loss, model.model, support, optimizer=rule, **options)

    def task_loss(self, model, task, *, step, key):
        def on_query(model):
            model = em.with_support_statistics(self.loss, model, task.support)
            return self.loss(model, task.query, None)[0]

        def losses(gradient):  # before the first and after every inner step
            options = {"observe": on_query, "gradient": gradient, "key": key}
            return self.inner_rollout(model, task.support, **options).observed

        modes = lambda: losses("first_order"), lambda: losses(None)  # one of them is computed
        before, *after = jax.lax.cond(step < self.anneal // 4, *modes)
        done = jnp.minimum(step / self.anneal, 1)
        objective = (1 - done) * sum(after) / len(after) + done * after[-1]
        return objective, {"loss": after[-1], "loss_before": before}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5_000, help="outer steps")
    args = parser.parse_args()

    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
    inner = em.InnerLoop(optax.sgd(0.01), steps=3)
    strategy = EveryStepMAML(em.losses.mse, inner, optax.adam(1e-3))
    state = em.Trainer(strategy, meta_batch_size=25).fit(model, tasks, args.steps)

    result = em.evaluate(strategy, state.model, tasks, num_tasks=600, seed=1)
    before, *_, after = result.mean()
    print(f"MSE {before:.2f} before, {after:.2f} ± {result.ci95()[-1]:.2f} after adapting")
    print("learnt rates:", 0.01 * jnp.exp(state.model.extra["log_rates"]))


if __name__ == "__main__":
    main()
