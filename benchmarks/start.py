"""What a run costs before it runs: the import, the way to the compiler, and the first step.

Each is measured in a process that has compiled nothing yet.
"""

import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

import eqxmeta as em
from eqxmeta.callbacks import Lambda

from ._report import Row
from ._timing import ratios
from ._workload import TASKS
from .loop import by_hand, notebook_maml, notebook_model, notebook_tasks


def run(pairs, quick):
    processes, width = (1, 4) if quick else (pairs, 64)
    fit, scan, before, bare = [], [], [], []
    for _ in range(processes):
        fit.append(_fresh("fit_sines()"))
        scan.append(_fresh("scan_sines()"))
        bare.append(_fresh(f"lower_images({width})"))
        before.append(_fresh(f"fit_images({width})"))
    first, note = "seconds to the first metrics, with compilation", "absolute; fresh processes"
    return [
        Row("first step, fit", first, fit, note=note),
        Row("first step, scan", first, scan, note=note),
        Row("first step", "time of fit over the hand-written scan", ratios(fit, scan)),
        Row("before the compiler, fit", "seconds, Conv4, 5 inner steps", before, note=note),
        Row(
            "before the compiler",
            "time of fit over tracing and lowering one outer step, Conv4, 5 inner steps",
            ratios(before, bare),
        ),
        _imports(processes),
    ]


def fit_sines():
    ends = []
    callback = Lambda(on_chunk_end=lambda run, metrics: ends.append(time.perf_counter()))
    options = {"meta_batch_size": TASKS, "callbacks": [callback], "summary": False}
    model, trainer = notebook_model(), em.Trainer(notebook_maml(), **options)
    began = time.perf_counter()
    trainer.fit(model, notebook_tasks(), 1)
    return ends[0] - began


def scan_sines():
    model = notebook_model()
    began = time.perf_counter()
    jax.device_get(by_hand(model, 1)(jax.random.key(0)))
    return time.perf_counter() - began


def images(width):
    """MAML with 5 inner steps, Conv4 and a meta-batch of 4 tasks of 5 ways, 1 shot."""
    inner = em.InnerLoop(optax.sgd(0.4), 5)
    strategy = em.MAML(em.losses.cross_entropy, inner, optax.adam(1e-3))
    pictures = np.random.default_rng(0).random((100, 1, 28, 28), np.float32)
    episodes = em.tasks.Episodes(pictures, np.arange(100) // 20, ways=5, shots=1, queries=5)
    return strategy, em.nn.Conv4(1, 5, width=width, key=jax.random.key(0)), episodes


def fit_images(width):
    """Seconds until the program of the loop is compiled, less those of compiling smaller ones."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((time.perf_counter() - seconds, seconds))

    strategy, model, episodes = images(width)
    trainer = em.Trainer(strategy, meta_batch_size=4, summary=False)
    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    trainer.fit(model, episodes, 1)
    largest, _ = max(compiled, key=lambda program: program[1])
    return largest - began - sum(seconds for at, seconds in compiled if at < largest)


def lower_images(width):
    strategy, model, episodes = images(width)
    arrays, static = eqx.partition(strategy.init(model), eqx.is_array)
    tasks = jax.vmap(episodes.sample)(jax.random.split(jax.random.key(0), 4))

    def step(arrays, tasks):
        new, metrics = strategy.outer_update(eqx.combine(arrays, static), tasks, key=None)
        return eqx.filter(new, eqx.is_array), metrics

    began = time.perf_counter()
    jax.jit(step).lower(arrays, tasks)
    return time.perf_counter() - began


def _imports(processes):
    # With bytecode, as users have it, also where the environment says not to write any.
    code = (
        "import sys; sys.dont_write_bytecode = False;"
        "import equinox, optax, time; began = time.perf_counter();"
        "import eqxmeta, eqxmeta.callbacks; print(time.perf_counter() - began)"
    )
    _printed(code)  # writes it
    seconds = [_printed(code) for _ in range(processes)]
    what = "seconds that eqxmeta adds to equinox and optax"
    return Row("import", what, seconds, note="absolute; fresh processes")


def _fresh(call):
    return _printed(f"from benchmarks import start; print(start.{call})")


def _printed(code):
    """The number that `code` prints, in a new process."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    return float(done.stdout)
