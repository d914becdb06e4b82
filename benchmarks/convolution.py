"""MAML on Conv-4 in `Trainer.fit`: `em.nn.Conv4`, and a model of one's own by `em.nn.fast`, against
Equinox's layers and PyTorch.

5 ways, 1 shot, 5 queries a class, 28x28 images, 4 tasks, 1 inner step, batch statistics of the
examples at hand. The images are noise, made once: what they show costs nothing and tells nothing.
"""

import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import eqxmeta as em

from ._report import Row
from ._timing import in_turn, ratios
from ._workload import relative_error

TASKS, WAYS, QUERIES = 4, 5, 5
AGREE = 1e-4


class Block(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: em.nn.BatchNorm
    pool: eqx.nn.MaxPool2d

    def __init__(self, inputs, width, key):
        self.conv = eqx.nn.Conv2d(inputs, width, 3, padding=1, key=key)
        self.norm = em.nn.BatchNorm(width)
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x):
        return self.pool(jax.nn.relu(self.norm(self.conv(x))))


class Conv4(eqx.Module):
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, width, key):
        *keys, head_key = jax.random.split(key, 5)
        self.blocks = [Block(width if i else 1, width, k) for i, k in enumerate(keys)]
        self.head = eqx.nn.Linear(width, WAYS, key=head_key)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.ravel(x))


def weights(model):
    found = []
    for block in model.blocks:
        found += [block.conv.weight, block.conv.bias, block.norm.weight, block.norm.bias]
    found = [np.asarray(x) for x in [*found, model.head.weight, model.head.bias]]
    return [x.ravel() if x.ndim == 3 else x for x in found]


class Batches:
    """The same batch at every step, from the host."""

    def __init__(self, tasks):
        self.tasks = jax.tree.map(np.asarray, tasks)

    def __getitem__(self, step):
        return self.tasks


def images():
    def batch(key, shots):
        x = jax.random.uniform(key, (TASKS, WAYS * shots, 1, 28, 28))
        return x, jnp.broadcast_to(jnp.arange(WAYS * shots, dtype=jnp.int32) % WAYS, x.shape[:2])

    support_key, query_key = jax.random.split(jax.random.key(0))
    return em.Task(batch(support_key, 1), batch(query_key, QUERIES))


def maml(optimizer, cls=em.MAML):
    return cls(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.4), 1), optimizer)


def meta_gradient(model, tasks):
    """In float64: in float32 a ReLU whose input is zero to rounding may go either way."""
    with jax.enable_x64(True):
        model, tasks = jax.tree.map(widened, (model, tasks))
        # The trace without decay is the gradient itself.
        strategy = maml(optax.trace(decay=0.0))
        state, _ = strategy.outer_update(strategy.init(model), tasks, key=None)
        return weights(state.opt_state.trace)


def widened(x):
    wide = eqx.is_inexact_array(x)
    return jnp.asarray(np.asarray(x), jnp.float64) if wide else x


def fit(model, tasks, steps, cls=em.MAML):
    """A function that trains, and returns the seconds of an outer step of the running loop: what
    `steps` more steps take. What `fit` does once, such as tracing, is not what is compared."""
    trainer = em.Trainer(maml(optax.adam(1e-3), cls), meta_batch_size=TASKS, summary=False)

    def seconds(steps):
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that Equinox's layers will be slow
            jax.block_until_ready(trainer.fit(model, Batches(tasks), steps).step)
        return time.perf_counter() - began

    seconds(1)  # compiles
    return lambda: (seconds(1 + steps) - seconds(1)) / steps


def seconds_of(train, steps):
    """As `fit` does, of a function that takes as long as it takes."""

    def timed():
        began = time.perf_counter()
        train(steps)
        return (time.perf_counter() - began) / steps

    return timed


def compare(functions, pairs):
    """Seconds of a step of each function, one after the other, `pairs` times."""
    found = {name: [] for name in functions}
    for _ in range(pairs):
        for name, function in functions.items():
            found[name].append(function())
    return found


def run(pairs, quick):
    width, steps, slow_steps = (4, 20, 5) if quick else (64, 40, 4)
    slow, tasks = Conv4(width, jax.random.key(0)), images()
    model = em.nn.Conv4(1, WAYS, width=width, norm="batch", key=jax.random.key(1))
    own = em.nn.fast(slow)
    model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(own))
    gradient = meta_gradient(model, tasks)
    rows = [_against_torch(model, tasks, gradient, steps, pairs)]

    error = relative_error(meta_gradient(slow, tasks), gradient)
    if not error < AGREE:
        raise AssertionError(f"Equinox's layers: meta-gradient differs from ours by {error:.1e}")
    functions = {
        "slow": fit(slow, tasks, slow_steps),
        "em.nn.Conv4": fit(model, tasks, steps),
        "em.nn.fast": fit(own, tasks, steps),
    }
    timed = compare(functions, pairs)
    note = f"meta-gradients agree to {error:.0e} in float64"
    for name in ("em.nn.Conv4", "em.nn.fast"):
        what, ratio = (
            "steps/s of fit over fit with Equinox's layers",
            ratios(timed["slow"], timed[name]),
        )
        rows.append(Row(f"convolution, equinox, {name}", what, ratio, note=note))
    return rows + _breakdown(model, tasks, steps, pairs)


def _against_torch(model, tasks, gradient, steps, pairs):
    target, what = "convolution, torch", "steps/s of fit over PyTorch, a task at a time"
    try:
        import torch

        from .peers._torch_conv4 import Peer
    except ImportError as error:
        note = f"not measured: {error}; pip install -e '.[bench-torch]'"
        return Row(target, what, [], note=note)
    arrays = [np.asarray(x) for x in (*tasks.support, *tasks.query)]
    wide = [x.astype(float) if x.dtype.kind == "f" else x for x in arrays]
    exact = Peer([w.astype(float) for w in weights(model)], wide).meta_gradient()
    error = relative_error(exact, gradient)
    if not error < AGREE:
        raise AssertionError(f"torch: meta-gradient differs from ours by {error:.1e}")
    peer, ours = Peer(weights(model), arrays), fit(model, tasks, steps)
    default = torch.get_num_threads()
    try:
        times = {}
        for threads in dict.fromkeys([default, 1]):
            torch.set_num_threads(threads)
            times[threads] = min(in_turn({"": lambda: peer.train(2)}, 2)[""])
        best = min(times, key=times.get)
        torch.set_num_threads(best)
        timed = compare({"torch": seconds_of(peer.train, steps), "ours": ours}, pairs)
    finally:
        torch.set_num_threads(default)
    note = f"meta-gradients agree to {error:.0e} in float64; {best} torch threads are best"
    return Row(target, what, ratios(timed["torch"], timed["ours"]), note=note)


def _breakdown(model, tasks, steps, pairs):
    """Milliseconds a task of an outer step, and of the parts of one pass over the query images."""
    functions = {
        "MAML": fit(model, tasks, steps),
        "first order": fit(model, tasks, steps, em.FOMAML),
    }
    timed = compare(functions, pairs)
    parts = {k: [1e3 * s / TASKS for s in seconds] for k, seconds in timed.items()}
    parts["second order"] = [
        a - b for a, b in zip(parts["MAML"], parts["first order"], strict=True)
    ]
    for name, (fun, *args) in _parts(model, tasks).items():
        repeat = _in_a_loop(fun, *args)
        seconds = in_turn({"": lambda repeat=repeat: repeat(10)}, pairs)[""]
        parts[name] = [1e2 * s for s in seconds]
    return [Row(f"convolution, {k}", "ms a task", values) for k, values in parts.items()]


def _in_a_loop(fun, *args):
    @jax.jit
    def repeat(n):
        # The next call depends on the last one, and on every number of it.
        def body(_, total):
            first = jax.tree.map(lambda x: x + 0 * total, args[0])
            return total + sum(jnp.sum(x) for x in jax.tree.leaves(fun(first, *args[1:])))

        return lax.fori_loop(0, n, body, jnp.zeros(()))

    return repeat


def _parts(model, tasks):
    inputs = [jnp.moveaxis(tasks.query[0][0], 1, -1)]
    for block in model.blocks:
        inputs.append(em.losses.predict(block, inputs[-1]))
    block, layers = model.blocks[0], [b.conv for b in model.blocks]

    def forward(inputs):
        return [em.losses.predict(c.channels_last, x) for c, x in zip(layers, inputs, strict=False)]

    outputs = forward(inputs)

    def filters(outputs, inputs):
        def apply(weights):
            return [
                em.losses.predict(eqx.tree_at(lambda c: c.weight, c, w).channels_last, x)
                for c, w, x in zip(layers, weights, inputs, strict=False)
            ]

        return jax.vjp(apply, [c.weight for c in layers])[1](outputs)

    def rest(y):
        def after(y):
            return block.pool.channels_last(jax.nn.relu(block.norm.channels_last(y)))

        pooled, back = jax.vjp(lambda y: em.losses.predict(after, y), y)
        return back(pooled)

    return {
        "convolutions forward": (forward, inputs),
        "filter gradients": (filters, outputs, inputs),
        "norm, relu and pool, first block, with gradient": (rest, outputs[0]),
    }
