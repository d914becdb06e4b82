"""What the processes of `pair.py` do, and tell of it."""

import hashlib
import time
import warnings
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    Lambda,
    ProgressBar,
    TensorBoard,
)

from .. import resume_run
from ..boring import BoringModel, BoringStrategy, BoringTasks, host_batch
from .pair import tell

# One, so that its programs are compiled once.
STRATEGY = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.05), 1), optax.sgd(0.05))


def bits(tree) -> str:
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def everything(folder: Path, every: int = 5):
    return [
        ProgressBar(disable=False),
        TensorBoard(folder / "board", every=1),
        JSONL(folder / "log.jsonl"),
        Evaluate(BoringTasks(), every=every, num_tasks=7),
        EarlyStopping("eval/loss", patience=1000),
        Checkpoint(folder / "saved", every=every, monitor="eval/loss"),
    ]


def train(steps, callbacks=(), *, tasks=None, learner=None, resume=None, **options):
    options = {"meta_batch_size": 4, "summary": False, **options}
    trainer = em.Trainer(learner or STRATEGY, callbacks=callbacks, **options)
    tasks = BoringTasks() if tasks is None else tasks
    state = trainer.fit(BoringModel(), tasks, steps, resume=resume)
    return trainer, state


def failure(name, attempt) -> None:
    """Tell by what it fails."""
    try:
        attempt()
    except BaseException as error:
        notes = " ".join(getattr(error, "__notes__", []))
        tell(name, [type(error).__name__, f"{error} {notes}"])
    else:
        tell(name, None)


def one_run(folder: Path) -> None:
    """With everything attached, and what the other processes have of it."""
    callbacks = everything(folder)
    _, state = train(10, callbacks, summary=True)
    tell("bits", bits(state))
    tell("evaluated", callbacks[3].result.values["loss"].tolist())
    again = em.evaluate(STRATEGY, state.model, BoringTasks(), num_tasks=7, devices="all")
    tell("again", again.values["loss"].tolist())
    failure("refused", lambda: train(10, everything(folder)))
    mine = jax.process_index() == 1
    stop = Lambda(name="stop", every=2, on_step_end=lambda run: mine and run.request_stop("enough"))
    trainer, state = train(40, [stop, Evaluate(BoringTasks(), every=4, num_tasks=7)])
    tell("stopped", [trainer.stop_reason, int(state.step)])

    def fail(run):
        if mine and run.step == 4:
            raise LookupError("of process 1")

    bad = Lambda(name="bad", every=2, on_step_end=fail)
    failure("callback", lambda: train(8, [bad, Evaluate(BoringTasks(), every=4, num_tasks=7)]))


class Batches:
    """On the host; fails in one process only."""

    def __init__(self, fails):
        self._fails = fails

    def __getitem__(self, step):
        if step == 6 and self._fails:
            raise LookupError("of process 1")
        return host_batch(step, meta_batch_size=4)


def more(folder: Path) -> None:
    """All that is slower, or rarer."""
    mine = jax.process_index() == 1
    trainer, state = train(
        10**6,
        [Lambda(every=10**6, on_step_end=print, on_chunk_end=lambda run, m: time.sleep(0.01))],
        max_time=0.5 if mine else 1e6,
        steps_per_execution=5,
    )
    tell("late", [trainer.stop_reason, int(state.step)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        nan = BoringStrategy(nan_loss=3)
        failure("raise", lambda: train(5, learner=nan))
        trainer, state = train(5, learner=nan, on_non_finite="stop")
        tell("stop", [trainer.stop_reason, int(state.step)])
        tell("skip", bits(train(5, learner=nan, on_non_finite="skip")[1]))
    unequal = Evaluate(BoringTasks(), every=3 + mine, num_tasks=7)
    failure("unequal", lambda: train(8, [unequal]))
    failure("source", lambda: train(9, tasks=Batches(mine)))
    tell("host", bits(train(9, tasks=Batches(False))[1]))
    failure("seeds", lambda: em.fit_seeds(em.Trainer(STRATEGY, meta_batch_size=4), BoringModel(),
        BoringTasks(), 2, seeds=2))  # fmt: skip
    first = jax.devices()[:1]  # in process 1 that of another; in process 0 it leaves one out
    failure("devices", lambda: train(2, devices=first))
    failure("divide", lambda: train(2, meta_batch_size=3))
    # The folder of process 1 is empty: all that it knows is of the first.
    own = folder / f"own-{jax.process_index()}"
    train(7, everything(own))
    trainer, state = train(20, everything(own), resume="auto")
    tell("resumed", bits(state))
    tell("straight", bits(train(20)[1]))
    tell("files", own.exists())


def long(folder: Path) -> None:
    """Until it is ended from outside; goes on from where it was."""
    show = Lambda(on_chunk_end=lambda run, metrics: print("running", run.step, flush=True))
    trainer, state = train(10**6, [show, *everything(folder, 10)], resume="auto")
    tell("ended", [trainer.stop_reason, int(state.step), bits(state)])


def short(folder: Path) -> None:
    """The same run, to a step that `long` has not reached."""
    steps = int((folder / "steps").read_text())
    trainer, state = train(steps, everything(folder, 10), resume="auto")
    tell("ended", [trainer.stop_reason, int(state.step), bits(state)])


def faulted(folder: Path) -> None:
    """What `tests.faults distributed` ends at random moments, and starts again."""
    learner, model, tasks = resume_run.parts(boring=True)
    callbacks = resume_run.everything(folder, tasks)
    trainer = em.Trainer(learner, meta_batch_size=4, seed=1, callbacks=callbacks)
    state = trainer.fit(model, tasks, int((folder / "steps").read_text()), resume="auto")
    tell("ended", [trainer.stop_reason, int(state.step), bits(state)])
