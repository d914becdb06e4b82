"""The meta-gradient in mixed mode against reverse mode, and with block rematerialisation.

Memory is what the compiled outer step needs beside its arguments and results, as XLA tells.
"""

import itertools
import statistics

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta._jaxpr.flops import count_flops

from ._report import Row
from ._step import compile_step
from ._timing import paired

TASKS = 4
TOO_MANY_FLOPS = 5e10  # of a step, to be timed
MIB = 2**20


def strategy_of(optimizer, steps, mode, remat=False):
    inner = em.InnerLoop(optimizer, steps, mode, remat=remat)
    return em.MAML(em.losses.mse, inner, optax.sgd(0.01), task_chunk=None)


def regression(inputs, outputs, batch):
    """Tasks of random numbers: support and query of `batch` examples each."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(TASKS, batch, inputs), (TASKS, batch, outputs)] * 2
    xs, ys, xq, yq = map(jax.random.normal, keys, shapes)
    return em.Task(support=(xs, ys), query=(xq, yq))


def deep(quick):
    """The design's workload: a deep MLP with an activation that keeps much."""
    model = eqx.nn.MLP(32, 8, 16 if quick else 128, 4, jax.nn.gelu, key=jax.random.key(0))
    return model, regression(32, 8, 16 if quick else 256)


def run(pairs, quick):
    return _deep(pairs, quick) + _everywhere(pairs, quick) + _remat(quick)


def _compare(model, tasks, optimizer, steps, pairs):
    """Reverse over mixed: memory, and the time of each pair if there are any."""
    reverse, mixed = (
        compile_step(strategy_of(optimizer, steps, mode), model, tasks)
        for mode in ("reverse", "mixed")
    )
    time = paired(reverse.run, {"mixed": mixed.run}, pairs, at_least=0.05)["mixed"] if pairs else []
    return reverse.temp_bytes / mixed.temp_bytes, time


def _deep(pairs, quick):
    steps = 4 if quick else 32
    memory, time = _compare(*deep(quick), optax.sgd(0.01), steps, pairs)
    what = "of reverse over mixed, deep GELU MLP, batch 256, 32 inner steps"
    return [
        Row("mixed mode, memory", f"temporary memory {what}", [memory]),
        Row("mixed mode, time", f"time {what}", time),
    ]


def _everywhere(pairs, quick):
    steps, widths, batches = (
        ((1, 8), (8,), (4,)) if quick else ((1, 8, 64, 512), (40, 128), (16, 256))
    )
    optimizers = {"SGD": optax.sgd(0.01), "Adam": optax.adam(0.01)}
    found = []
    for k, width, batch, name in itertools.product(steps, widths, batches, optimizers):
        model = eqx.nn.MLP(1, 1, width, 2, key=jax.random.key(0))
        tasks = regression(1, 1, batch)
        flops = _flops(strategy_of(optimizers[name], k, "mixed"), model, tasks)
        timed = pairs if flops < TOO_MANY_FLOPS else 0
        memory, time = _compare(model, tasks, optimizers[name], k, timed)
        settings = {"steps": k, "width": width, "batch": batch, "optimizer": name}
        found.append(settings | {"memory": memory, "time": time})
    _print(found)

    def middle(f):
        return statistics.median(f["time"])

    slowest = min((f for f in found if f["time"]), key=middle)
    leanest = min(found, key=lambda f: f["memory"])
    skipped = sum(not f["time"] for f in found)
    where = f"of {len(found)} settings; {skipped} of over {TOO_MANY_FLOPS:.0e} FLOPs not timed"
    return [
        Row(
            "mixed mode, slowest",
            "time of reverse over mixed, MLP 1-w-w-1, where it is lowest",
            slowest["time"],
            note=f"{_settings(slowest)}, {where}",
            details=found,
        ),
        Row(
            "mixed mode, least saved",
            "temporary memory of reverse over mixed, where it is lowest",
            [leanest["memory"]],
            note=_settings(leanest),
        ),
    ]


def _flops(strategy, model, tasks):
    def update(state, tasks):
        return strategy.outer_update(state, tasks, key=None)

    return count_flops(update, strategy.init(model), tasks)


def _settings(f):
    return f"{f['steps']} steps, width {f['width']}, batch {f['batch']}, {f['optimizer']}"


def _print(found):
    print("reverse over mixed, MLP 1-w-w-1:  memory    time")
    for f in found:
        time = f"{statistics.median(f['time']):8.2f}" if f["time"] else "       -"
        print(f"{_settings(f):<34}{f['memory']:6.2f}{time}", flush=True)


def _remat(quick):
    model, tasks = deep(quick)
    table = []
    for steps in (8, 32) if quick else (32, 128, 512):
        for remat in (True, False):
            step = compile_step(strategy_of(optax.sgd(0.01), steps, "mixed", remat), model, tasks)
            table.append({"steps": steps, "remat": remat, "MiB": step.temp_bytes / MIB})
    blocks = [t for t in table if t["remat"]]
    growth = blocks[-1]["MiB"] / blocks[-2]["MiB"]
    sizes = ", ".join(
        f"{t['steps']} steps {'with' if t['remat'] else 'without'}: {t['MiB']:.1f}" for t in table
    )
    steps = f"{blocks[-1]['steps']} over {blocks[-2]['steps']} inner steps"
    return [
        Row(
            "remat, growth",
            f"temporary memory of {steps}, remat=True",
            [growth],
            note=f"MiB at {sizes}",
            details=table,
        )
    ]
