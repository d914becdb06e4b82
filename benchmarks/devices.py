"""The same outer steps by one device and by two, and by one process and by two.

Conv4 of width 16, 8 tasks of 5 ways, 1 shot and 3 queries a class, 1 inner step. The devices are
cores of this CPU, so that two cannot be more than twice as fast as one that keeps to one core, nor
faster at all than one that has both.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ._report import Row

TASKS, WAYS, QUERIES = 8, 5, 3


def run(pairs, quick):
    rows = []
    for chunk in (1, None):
        with_chunk = f"task_chunk={chunk}"
        [seconds] = _measured(1, 2, pairs, quick, chunk)
        two = f"speed of 2 devices over 1, {with_chunk}"
        rows.append(Row(f"devices, {with_chunk}", two, _over(seconds, "1", "2")))
        [alone] = _measured(1, 1, pairs, quick, chunk)
        first, _ = _measured(2, 1, pairs, quick, chunk)
        what = f"speed of 2 processes over 1, {with_chunk}"
        rows.append(Row(f"processes, {with_chunk}", what, _over({**first, **alone}, "1", "all")))
    return rows


def _over(seconds: Mapping[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]


def _measured(
    processes: int, devices: int, pairs: int, quick: bool, chunk: int | None
) -> list[dict[str, list[float]]]:
    """What each of so many processes, with so many devices of one core each, says of itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    command = [sys.executable, "-m", __name__, "--pairs", str(pairs), "--chunk", str(chunk or 0)]
    command += ["--steps", "2" if quick else "10", "--processes", str(processes)]
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    options["cwd"] = Path(__file__).parent.parent
    started = [
        subprocess.Popen([*command, "--port", str(port), "--index", str(index)], **options)
        for index in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process of the benchmark has failed: see above")
    return [json.loads(text.splitlines()[-1]) for text in said]


def worker() -> None:
    parser = argparse.ArgumentParser()
    for name in ("pairs", "chunk", "steps", "processes", "port", "index"):
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()

    import jax
    import numpy as np
    import optax

    import eqxmeta as em

    from ._timing import in_turn

    if args.processes > 1:
        address = f"localhost:{args.port}"
        jax.distributed.initialize(address, args.processes, args.index)
    images = np.random.default_rng(0).random((20, 1, 28, 28), np.float32).repeat(8, axis=0)
    labels = np.arange(20).repeat(8)
    tasks = em.tasks.Episodes(images, labels, ways=WAYS, shots=1, queries=QUERIES)
    strategy = em.MAML(
        em.losses.cross_entropy,
        em.InnerLoop(optax.sgd(0.1), 1),
        optax.sgd(0.01),
        task_chunk=args.chunk or None,
    )
    model = em.nn.Conv4(1, WAYS, size=28, width=16, key=jax.random.key(0))

    def fit(devices):
        options = {"meta_batch_size": TASKS, "summary": False, "steps_per_execution": 10}
        trainer = em.Trainer(strategy, devices=devices, **options)
        return lambda: trainer.fit(model, tasks, args.steps)

    several = args.processes > 1
    functions = {"all": fit("all")} if several else {"1": fit(None)}
    if jax.device_count() > 1 and not several:
        functions["2"] = fit("all")
    print(json.dumps(in_turn(functions, args.pairs)))


if __name__ == "__main__":
    worker()
