"""Plain JAX, as in the founding notebook: one jitted outer step a Python iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._workload import B1, B2, EPS, INNER_RATE, OUTER_RATE, READ_EVERY, Tasks, Weights, sample
from . import EXTRAS

OPTIMIZER = optax.adam(OUTER_RATE, B1, B2, EPS)


def predict(params, x):
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w.T + b)
    return x @ weight.T + bias


def loss(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


def task_loss(params, support_x, support_y, query_x, query_y):
    grads = jax.grad(loss)(params, support_x, support_y)
    adapted = jax.tree.map(lambda p, g: p - INNER_RATE * g, params, grads)
    return loss(adapted, query_x, query_y)


def meta_loss(params, tasks):
    return jnp.mean(jax.vmap(task_loss, (None, 0, 0, 0, 0))(params, *tasks))


meta_gradient = jax.jit(jax.grad(meta_loss))


@jax.jit
def step(params, opt_state, tasks):
    value, grads = jax.value_and_grad(meta_loss)(params, tasks)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


class Peer:
    name = "JAX, a jitted step"
    extra = EXTRAS["notebook"]

    def __init__(self, weights: Weights):
        self.params = jax.tree.map(jnp.asarray, weights)
        self.loss = None

    def meta_gradient(self, tasks: Tasks) -> list[np.ndarray]:
        return [np.asarray(g) for g in jax.tree.leaves(meta_gradient(self.params, tasks))]

    def train(self, steps: int) -> None:
        rng = np.random.default_rng(0)
        params, opt_state = self.params, OPTIMIZER.init(self.params)
        for i in range(steps):
            params, opt_state, value = step(params, opt_state, sample(rng))
            if i % READ_EVERY == 0 or i == steps - 1:
                self.loss = float(value)
        jax.block_until_ready(params)
