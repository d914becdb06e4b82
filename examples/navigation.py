"""Meta-reinforcement learning: a policy that finds a goal in the plane after one gradient step.

    python examples/navigation.py

The policy does not see the goal of a task: it walks 20 times, is told at each step how far away it
is, takes a step along the policy gradient, and walks there (Finn et al. 2017, section 5.3).
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from matplotlib.figure import Figure

import eqxmeta as em
from eqxmeta.callbacks import ProgressBar

WALKS, HORIZON, SPEED = 20, 20, 0.1


class Policy(eqx.Module):
    mean: eqx.nn.MLP
    log_scale: jax.Array

    def __init__(self, key):
        self.mean = em.nn.fast(eqx.nn.MLP(2, 2, 64, 2, jax.nn.tanh, key=key))
        self.log_scale = jnp.full(2, -0.5)


class Goals(eqx.Module):
    """Goals on the unit circle. A set of a task is what walks are drawn from: a key and a goal."""

    def sample(self, key, angle=None):
        angle_key, *keys = jax.random.split(key, 3)
        angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi) if angle is None else angle
        return em.Task(*((key, jnp.stack([jnp.cos(angle), jnp.sin(angle)])) for key in keys))


def walk(policy, goal, key):
    """Positions, actions `[HORIZON, WALKS, 2]` and rewards `[HORIZON, WALKS]`."""

    def step(position, noise):
        action = jax.vmap(policy.mean)(position) + jnp.exp(policy.log_scale) * noise
        new = position + SPEED * jnp.clip(action, -1, 1)
        return new, (position, action, -jnp.linalg.norm(new - goal, axis=-1))

    noise = jax.random.normal(key, (HORIZON, WALKS, 2))
    return jax.lax.scan(step, jnp.zeros((WALKS, 2)), noise)[1]


def expected_return(log_probs, rewards):
    """The mean return of walks, of which derivatives of any order are estimates without bias of
    those of the expected return: DiCE (Foerster et al. 2018, 1802.05098), with advantages (Loaded
    DiCE, Farquhar et al. 2019, 1909.10549). Arguments: `[horizon, walks]`, two walks or more."""
    to_go = jnp.cumsum(stop_gradient(rewards)[::-1], axis=0)[::-1]
    # What comes on average, in the other walks: independent of the walk's own actions.
    advantage = (to_go - to_go.mean(1, keepdims=True)) * (n := rewards.shape[1]) / (n - 1)
    total = jnp.cumsum(log_probs, axis=0)
    totals = jnp.stack([total, total - log_probs])  # with the action, and without
    magic, before = jnp.exp(totals - stop_gradient(totals))  # 1, but for their derivatives
    return (to_go[0] + (advantage * (magic - before)).sum(0)).mean()


def loss(policy, batch, _):
    key, goal = batch
    arrays, others = eqx.partition(policy, eqx.is_array)
    positions, actions, rewards = walk(eqx.combine(stop_gradient(arrays), others), goal, key)
    means, scale = jax.vmap(jax.vmap(policy.mean))(positions), jnp.exp(policy.log_scale)
    log_probs = jax.scipy.stats.norm.logpdf(actions, means, scale).sum(-1)
    value = expected_return(log_probs, rewards)
    return -value, {"return": value}


def recipes(steps):
    # The first inner step is large; those after it, at test, are smaller.
    inner = em.InnerLoop(optax.sgd(lambda count: jnp.where(count == 0, 0.02, 0.005)), steps=1)
    rate = optax.cosine_decay_schedule(1e-3, steps)
    adam = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    return em.Joint(loss, inner, adam), em.MAML(loss, inner, adam)


def draw(learners):
    figure = Figure((12.8, 3.9), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    for panel, (strategy, model, adapt) in zip(panels, learners, strict=True):
        panel.set(title=type(strategy).__name__ + ", after one step" * adapt, aspect="equal")
        for i in range(6):
            task = Goals().sample(jax.random.key(i), (i + 0.25) * jnp.pi / 3)
            policy = strategy.inner_adapt(model, task.support) if adapt else model
            key, goal = task.query
            walks = eqx.filter_jit(walk)(policy, goal, key)[0][:, :5]
            panel.plot(*walks.transpose(2, 0, 1), color=f"C{i}", lw=0.8)
            panel.plot(*goal[:, None], "*", color=f"C{i}", ms=12, mec="black")
    figure.savefig("navigation.png", dpi=70)


def main():
    parser = argparse.ArgumentParser(description="Point navigation after one gradient step.")
    parser.add_argument("--steps", type=int, default=800, help="outer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    learners, bar = [], [ProgressBar()]
    print("return to 600 new goals after 0, 1 and 3 inner steps, ± 95%")
    for strategy in recipes(args.steps):
        trainer = em.Trainer(strategy, meta_batch_size=20, seed=args.seed, callbacks=bar)
        model = trainer.fit(Policy(jax.random.key(args.seed)), Goals(), args.steps).model
        result = em.evaluate(strategy, model, Goals(), inner_steps=3, seed=1)
        mean, half = result.mean("return"), result.ci95("return")
        cells = (f"{mean[k]:9.2f} ± {half[k]:.2f}" for k in (0, 1, 3))
        print(f"{type(strategy).__name__:6}", *cells)
        learners += [(strategy, model, False), (strategy, model, True)]
    draw(learners)


if __name__ == "__main__":
    main()
