"""Pictures of what TensorBoard shows, taken by a browser: to be looked at.

    python -m tests.look_tensorboard OUT   # needs `chromium` and `tensorboard`; takes minutes

Three strategies with other numbers of inner steps log into one folder; then the four tabs are
photographed into OUT. What must be on them, the page `docs/logging.md` says.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

import eqxmeta as em
from eqxmeta.callbacks import Confusion, Evaluate, TensorBoard

TABS = {"scalars": 20, "custom_scalars": 20, "hparams": 20, "images": 20}


def write_runs(folder: Path, steps: int = 200) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(10, 1, 6, 6))
    images = (np.repeat(patterns, 20, axis=0) + rng.normal(size=(200, 1, 6, 6))).astype(np.float32)
    tasks = em.tasks.Episodes(images, np.repeat(np.arange(10), 20), ways=3, shots=1, queries=5)
    loss, rate = em.losses.cross_entropy, 3e-3
    adam = optax.inject_hyperparams(optax.adam)

    def model(outputs):
        mlp = eqx.nn.MLP(36, outputs, 32, 1, key=jax.random.key(0))
        return em.nn.fast(eqx.nn.Sequential([eqx.nn.Lambda(jax.numpy.ravel), *mlp.layers]))

    def inner(steps):
        return em.InnerLoop(optax.sgd(0.1), steps)

    learners = {
        "ProtoNet": (em.ProtoNet(loss, adam(rate)), model(8), {}),
        "MAML": (em.MAML(loss, inner(3), adam(rate)), model(3), {"inner_rate": 0.1}),
        "ANIL": (em.ANIL(loss, inner(5), adam(rate)), model(3), {"inner_rate": 0.1}),
    }
    for name, (strategy, start, options) in learners.items():
        callbacks = [
            TensorBoard(folder / name, hparams={"rate": rate, **options}),
            Evaluate(tasks, every=20, num_tasks=50, at_start=True),
            Confusion(tasks, every=100),
        ]
        trainer = em.Trainer(strategy, meta_batch_size=4, callbacks=callbacks, summary=False)
        trainer.fit(start, tasks, steps)


def photograph(folder: Path, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", port]
    server = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}data/runs", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        for tab, seconds in TABS.items():
            subprocess.run(
                [
                    "chromium",
                    "--no-sandbox",
                    "--headless",
                    f"--screenshot={out / f'{tab}.png'}",
                    "--window-size=1600,1200",
                    f"--virtual-time-budget={seconds * 1000}",
                    f"{url}#{tab}",
                ],
                stderr=subprocess.DEVNULL,
                timeout=300,
                check=True,
            )
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "runs", ignore_errors=True)
    write_runs(out / "runs")
    photograph(out / "runs", out)


if __name__ == "__main__":
    main()
