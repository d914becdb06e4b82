"""Every write, fsync and rename of a short run fails, one after the other."""

import errno
import json
from pathlib import Path

import eqxmeta as em
from eqxmeta.callbacks import JSONL, Checkpoint, TensorBoard

from ..boring import boring_fit, same_bits
from ..same_run import logged_steps
from .inject import Disk, Tally

STEPS, EVERY = 30, 10


def writes(folder: Path, *, stride: int = 1) -> Tally:
    """The nth call fails, for every `stride`th n, under both policies of `Checkpoint`."""
    tally, straight = Tally(), {step: boring_fit(step) for step in (10, 20, 30)}
    for policy in ("raise", "warn"):
        (folder / policy).mkdir(parents=True)  # no part of a run, whose first would sync it
        with Disk().watched() as disk:
            _fit(folder / policy / "whole", policy)
        for nth in range(1, len(disk.calls) + 1, stride):
            where = folder / policy / str(nth)
            problem = _fails(where, policy, nth, straight)
            tally.add(f"{disk.calls[nth - 1]} ({policy})", problem and f"call {nth}: {problem}")
    return tally


def _fit(folder: Path, policy):
    callbacks = [Checkpoint(folder / "saved", every=EVERY, keep=None, on_error=policy)]
    if policy == "raise":  # the logs have no policy: what fails in them ends the run
        callbacks += [JSONL(folder / "log.jsonl"), TensorBoard(folder / "board", every=1)]
    return boring_fit(STEPS, callbacks=callbacks, steps_per_execution=5, resume="auto")


def _fails(folder: Path, policy, nth: int, straight) -> str | None:
    """What was wrong about the run whose nth call fails, or about the one after it."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    raised = None
    with Disk(nth, fail).watched() as disk:
        try:
            state = _fit(folder, policy)
        except OSError as error:
            raised = error
        else:
            if not same_bits(state, straight[STEPS]):
                return "another result"
    if len(disk.calls) < nth:
        return "the run ended before the call"
    # Where the folder itself could not be made there is no run that could go on.
    if (raised is not None) != (policy == "raise" or not (folder / "saved").exists()):
        return f"{policy}, but {raised!r}"
    if raised is not None and "No space left" not in str(raised):
        return f"an error that does not say so: {raised}"
    saved = folder / "saved"
    for path in saved.glob("step-*.ckpt"):
        step = int(path.name[5:-5])
        if not same_bits(em.load(path, straight[step]), straight[step]):
            return f"{path.name} holds another state"
    if leftovers := list(saved.glob(".*")):
        return f"leftovers {leftovers}"
    if not same_bits(_fit(folder, policy), straight[STEPS]):
        return "another result once resumed"
    if policy == "raise":
        lines = (folder / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line)["step"] for line in lines]
        if rows != list(range(1, STEPS + 1)):
            return f"rows {rows}"
        if (steps := logged_steps(folder / "board")) != rows:
            return f"events {steps}"
    return None
