"""`Trainer.fit` against the same MAML as others write it: see `peers`.

A peer counts once its meta-gradient agrees with ours. Those in torch get the better of torch's own
number of threads and a single one.
"""

import functools
import math
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqxmeta as em

from . import peers
from ._report import Row
from ._timing import in_turn, ratios
from ._workload import INNER_RATE, LAYERS, TASKS, initial_weights, relative_error, sample
from .loop import notebook_maml, notebook_tasks

PEERS = ("notebook", "torch_func", "torch_loop", "higher", "torchopt")
AGREE = 1e-4


def our_model(weights):
    model = eqx.nn.MLP(LAYERS[0], LAYERS[-1], LAYERS[1], len(LAYERS) - 2, key=jax.random.key(0))
    model = em.nn.fast(model)
    return eqx.tree_at(
        lambda m: [x for layer in m.layers for x in (layer.weight, layer.bias)],
        model,
        [jnp.asarray(x) for layer in weights for x in layer],
    )


def our_meta_gradient(weights, tasks):
    # The trace without decay is the gradient itself.
    inner = em.InnerLoop(optax.sgd(INNER_RATE), 1, "mixed")
    strategy = em.MAML(em.losses.mse, inner, optax.trace(decay=0.0))
    support_x, support_y, query_x, query_y = map(jnp.asarray, tasks)
    task = em.Task(support=(support_x, support_y), query=(query_x, query_y))
    state, _ = strategy.outer_update(strategy.init(our_model(weights)), task, key=None)
    return [np.asarray(g) for g in jax.tree.leaves(state.opt_state)]


def run(pairs, quick):
    seconds = 0.02 if quick else 1.5  # a run
    our_steps = 20 if quick else 3_000
    weights = initial_weights(0)
    tasks = sample(np.random.default_rng(0))
    gradient = our_meta_gradient(weights, tasks)
    trainer = em.Trainer(notebook_maml(), meta_batch_size=TASKS, summary=False)
    model, source = our_model(weights), notebook_tasks()

    found, missing = peers.available()
    rows = []
    for name in PEERS:
        if name in missing:
            reason, extra = missing[name]
            note = f"not measured: {reason}; pip install -e '.[{extra}]'"
            rows.append(Row(f"peer, {name}", "steps/s of fit over the peer's", [], note=note))
            continue
        peer = found[name](weights)
        error = relative_error(peer.meta_gradient(tasks), gradient)
        if not error < AGREE:
            raise AssertionError(f"{name}: meta-gradient differs from ours by {error:.1e}")
        note, steps = _prepare(peer, name != "notebook", seconds)
        functions = {
            "peer": lambda peer=peer, steps=steps: peer.train(steps),
            "ours": lambda: trainer.fit(model, source, our_steps),
        }
        timed = in_turn(functions, pairs)
        ratio = [r * our_steps / steps for r in ratios(timed["peer"], timed["ours"])]
        note = f"meta-gradients agree to {error:.0e}{note}"
        what = f"steps/s of fit over {peer.name}"
        rows.append(Row(f"peer, {name}", what, ratio, note=note))
    return rows


def _prepare(peer, torch_peer, seconds):
    """A note on threads, having set their number, and the steps that take about `seconds`."""
    if not torch_peer:
        return "", _steps(peer, seconds)
    import torch

    threads = _default_threads(torch)
    steps = {}
    for n in dict.fromkeys([threads, 1]):
        torch.set_num_threads(n)
        steps[n] = _steps(peer, seconds)
    best = max(steps, key=steps.get)
    torch.set_num_threads(best)
    return f"; the better of {threads} and 1 torch threads: {best}", steps[best]


@functools.cache
def _default_threads(torch):
    """Asked once, before the number is set for the first peer."""
    return torch.get_num_threads()


def _steps(peer, seconds):
    peer.train(3)  # compiles or warms up
    steps = 1
    while True:
        began = time.perf_counter()
        peer.train(steps)
        spent = time.perf_counter() - began
        if spent > seconds / 4:
            return max(1, math.ceil(steps * seconds / spent))
        steps *= 2
