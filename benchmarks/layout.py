"""How many tasks to compute at a time: `task_chunk="auto"` against every fixed choice."""

import statistics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqxmeta as em

from ._report import Row
from ._step import compile_step
from ._timing import in_turn, ratios
from .loop import notebook_maml, notebook_model, notebook_tasks

CHUNKS = {"1 task": 1, "4 tasks": 4, "all tasks": None}


class Block(eqx.Module):
    """3x3 convolution of stride 2 as patches and a product, normalisation over one example, ReLU:
    that of `examples/omniglot.py`."""

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


def sines(quick):
    tasks = jax.vmap(notebook_tasks().sample)(jax.random.split(jax.random.key(0), 16))
    return notebook_maml, notebook_model(), tasks


def images(quick):
    """4 tasks of 5 + 25 images of 28 x 28, 5 ways, a network of 64 channels."""

    def maml(**options):
        inner = em.InnerLoop(optax.sgd(0.4), 1)
        return em.MAML(em.losses.cross_entropy, inner, optax.adam(1e-3), **options)

    def batch(key, size):
        x = jax.random.uniform(key, (4, size, 28, 28))
        return x, jnp.broadcast_to(jnp.arange(size) % 5, (4, size))

    support_key, query_key, model_key = jax.random.split(jax.random.key(0), 3)
    tasks = em.Task(support=batch(support_key, 5), query=batch(query_key, 25))
    return maml, Network(5, 4 if quick else 64, model_key), tasks


def run(pairs, quick):
    rows = []
    for name, workload in (("MLP", sines), ("convnet", images)):
        maml, model, tasks = workload(quick)
        total = tasks.query[0].shape[0]
        # As many as there are, or more, is all of them.
        chunks = {which: n for which, n in CHUNKS.items() if n is None or n < total}
        steps = {
            which: compile_step(maml(task_chunk=chunk), model, tasks)
            for which, chunk in (chunks | {"auto": "auto"}).items()
        }
        runs = {which: step.run for which, step in steps.items()}
        seconds = in_turn(runs, pairs, at_least=0.0 if quick else 0.3)
        best = min(chunks, key=lambda which: statistics.median(seconds[which]))
        for which in chunks:
            what = f"speed of {which} at a time over {best}, the best"
            rows.append(
                Row(f"layout, {name}, {which}", what, ratios(seconds[best], seconds[which]))
            )
        ratio = ratios(seconds[best], seconds["auto"])
        what = f"speed of task_chunk='auto' over {best}, the best"
        rows.append(Row(f"layout, {name}, auto", what, ratio))
    saved = steps["all tasks"].temp_bytes / steps["1 task"].temp_bytes
    what = "temporary memory of all tasks over 1 at a time"
    rows.append(Row("layout, convnet, memory", what, [saved]))
    return rows
