"""`python -m tests.peak_memory FOLDER STEPS LEAVES`: a run with that many leaves of 8 MB, saved and
resumed in FOLDER; prints by how many MB its peak is above what the user's own model takes."""

import gc
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from .boring import BoringTasks


class Wide(eqx.Module):
    arrays: list[jax.Array]

    def __call__(self, x):
        return jnp.sum(x, keepdims=True) * self.arrays[0][:1]


class Shrink(em.Strategy):
    """Each step halves the parameters: nothing else that takes memory."""

    def init(self, model):
        return em.TrainState(jnp.zeros((), jnp.int32), model, ())

    def loss(self, model, batch, key):
        return em.losses.mse(model, batch, key)

    def inner_adapt(self, model, support, *, key=None):
        return model

    def outer_update(self, state, tasks, *, key):
        model = jax.tree.map(lambda x: 0.5 * x, state.model)
        return em.TrainState(state.step + 1, model, ()), {"loss": jnp.float32(1)}


def status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


def model_of(leaves: int) -> Wide:
    return Wide([jnp.full(2**21, float(index)) for index in range(leaves)])


def fit(model: Wide, folder: Path, steps: int) -> None:
    callbacks = [Checkpoint(folder, every=3)]
    trainer = em.Trainer(Shrink(), meta_batch_size=2, callbacks=callbacks, summary=False)
    trainer.fit(model, BoringTasks(), steps, resume="auto")


if __name__ == "__main__":
    folder, steps, leaves = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    fit(model_of(1), folder / f"warm-{steps}", 3)
    model = jax.block_until_ready(model_of(leaves))
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    fit(model, folder / "saved", steps)
    print(status("VmHWM") - before)
