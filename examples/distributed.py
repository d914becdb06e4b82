"""Several processes, on one machine or many, train one model: MAML on sine waves.

python examples/distributed.py                   alone
python examples/distributed.py --processes 2     two processes on this machine
srun python examples/distributed.py --cluster    as many as Slurm has started (Kubernetes, Open MPI)

All processes run the same script. Files and the terminal are the first one's; Ctrl-C or SIGTERM to
any of them ends all, with the run saved, and the same command goes on from there.
"""

import argparse
import signal
import socket
import subprocess
import sys

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, Evaluate, ProgressBar, TensorBoard


def train(args):
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    inner = em.InnerLoop(optax.sgd(0.01), steps=1)
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3))
    trainer = em.Trainer(
        strategy,
        meta_batch_size=24,  # a multiple of the number of devices
        devices="all",  # of all processes
        callbacks=[
            ProgressBar(),
            TensorBoard(f"{args.folder}/tensorboard"),
            JSONL(f"{args.folder}/metrics.jsonl"),
            Evaluate(tasks, every=1000, num_tasks=100),
            Checkpoint(f"{args.folder}/checkpoints", every=1000, monitor="eval/loss"),
        ],
    )
    state = trainer.fit(model, tasks, args.steps, resume="auto")
    if trainer.stop_reason == "interrupted":
        sys.exit(130)
    if trainer.stop_reason == "terminated":  # another process, which may be gone
        return
    # Every process calls it, and each has the result.
    result = em.evaluate(strategy, state.model, tasks, num_tasks=600, devices="all")
    if jax.process_index() == 0:
        before, after = result.mean("loss")
        print(f"{jax.process_count()} processes, {jax.device_count()} devices: ", end="")
        print(f"MSE {before:.2f} before, {after:.2f} ± {result.ci95('loss')[1]:.2f} after one step")


def start_processes(count):
    """This script, `count` times. JAX's coordinator is the first one, at a port that is free."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", address, "--index"]
    started = [subprocess.Popen([*command, str(index)]) for index in range(count)]

    def pass_on(number, frame):
        for process in started:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all by itself
    codes = [process.wait() for process in started]
    sys.exit(next((code for code in codes if code), 0))


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--steps", type=int, default=10_000, help="outer steps")
    parser.add_argument("--folder", default="runs/distributed")
    parser.add_argument("--processes", type=int, default=1, help="on this machine")
    parser.add_argument("--cluster", action="store_true", help="let JAX find the others")
    parser.add_argument("--coordinator", help="of --processes: where the first one listens")
    parser.add_argument("--index", type=int, help="of --processes: which one this is")
    args = parser.parse_args()

    if args.cluster:
        jax.distributed.initialize()
    elif args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.processes, args.index)
    elif args.processes > 1:
        start_processes(args.processes)
    train(args)


if __name__ == "__main__":
    main()
