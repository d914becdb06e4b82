"""A callback of one's own: it watches how far the parameters move, and ends a run that stalls.

`every` says at which outer steps it needs the host; between them nothing leaves the device.
"""

import argparse

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta.callbacks import Callback, Lambda


class StopWhenStill(Callback):
    def __init__(self, every, threshold):
        self.every = every
        self.threshold = threshold
        self.previous = None

    def on_step_end(self, run):
        params = eqx.filter(run.state.model, eqx.is_inexact_array)
        if self.previous is not None:
            moved = optax.tree.norm(optax.tree.sub(params, self.previous))
            run.log({"moved": float(moved)})  # TensorBoard, JSONL, ... receive it
            if moved < self.threshold:
                run.request_stop(f"moved only {moved:.3f} in {self.every} steps")
        self.previous = params


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5_000, help="outer steps")
    args = parser.parse_args()

    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
    schedule = optax.cosine_decay_schedule(1e-3, args.steps)
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(schedule))
    show = Lambda(on_log=lambda run, scalars: print(f"step {run.step}: {scalars}"))
    stop = StopWhenStill(every=max(1, args.steps // 20), threshold=0.05)
    em.Trainer(strategy, meta_batch_size=25, callbacks=[stop, show]).fit(model, tasks, args.steps)


if __name__ == "__main__":
    main()
