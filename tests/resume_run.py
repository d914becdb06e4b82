"""A run that `test_resume` starts, kills and resumes: `python -m tests.resume_run folder steps`.

Everything that has state is attached. `--boring` takes the strategy that compiles at once.
"""

import sys
from pathlib import Path

import optax

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    Callback,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    ProgressBar,
    TensorBoard,
)

from .boring import BoringModel, BoringStrategy, BoringTasks
from .helpers import tiny_mlp

SAVE_EVERY, KEEP = 50, 3


class Counter(Callback):
    """A user's callback with state: what it has seen must be the same with and without a break."""

    def __init__(self):
        self.rows = 0
        self.total = 0.0
        self._restored = False

    def on_fit_start(self, run):
        if not self._restored:
            self.rows, self.total = 0, 0.0
        self._restored = False

    def on_chunk_end(self, run, metrics):
        self.rows += len(metrics["step"])
        for value in metrics["loss"].tolist():
            self.total += value
        print("running", run.step, flush=True)

    def state_dict(self):
        return {"rows": self.rows, "total": self.total}

    def load_state_dict(self, state):
        self.rows, self.total = state["rows"], state["total"]
        self._restored = True


def parts(*, boring: bool):
    """`(strategy, model, tasks)`"""
    if boring:
        return BoringStrategy(), BoringModel(), BoringTasks()
    inner = em.InnerLoop(optax.sgd(0.01), steps=2)
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-2))
    return strategy, tiny_mlp(), em.tasks.Sinusoid(4, 4)


def everything(folder: Path, tasks, *, monitor="eval/loss"):
    return [
        ProgressBar(disable=False),
        Counter(),
        TensorBoard(folder / "board", every=1),
        JSONL(folder / "log.jsonl"),
        Evaluate(tasks, every=25, num_tasks=10),
        EarlyStopping("eval/loss", patience=1000),
        Checkpoint(folder / "saved", every=SAVE_EVERY, keep=KEEP, monitor=monitor),
    ]


def main(folder, steps, *flags):
    strategy, model, tasks = parts(boring="--boring" in flags)
    callbacks = everything(Path(folder), tasks)
    trainer = em.Trainer(strategy, meta_batch_size=3, seed=1, callbacks=callbacks)
    state = trainer.fit(model, tasks, int(steps), resume="auto")
    print("finished", int(state.step), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
