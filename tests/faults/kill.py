"""Runs that are ended from outside at random moments, or by themselves in the middle of a save or
of what comes before their first step: a checkpoint is loaded, a log is cut.

Every attempt is a process with Checkpoint, TensorBoard, JSONL and Evaluate, forked from one that
has imported JAX and not used it yet. When attempts have brought a run to its end, what it left is
what an uninterrupted run leaves: parameters, optimizer state, states of callbacks and JSONL
bitwise, and every step once in TensorBoard.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import jax

import eqxmeta as em
from eqxmeta.callbacks import Callback

from ..resume_run import everything, parts
from ..same_run import check_same_run
from .inject import Disk, Tally

STEPS = 1000
SECONDS = 0.6  # in which an attempt is hit, after its first chunk
SAVING, RESUMING = "kill -9 in a save", "kill -9 while resuming"
KINDS = ("kill -9", SAVING, RESUMING, "SIGTERM", "SIGINT")
# A run is killed at one of so many of the first calls that touch the disk: its first saves are
# among them; or a checkpoint is looked for and loaded, and a log is cut.
CALLS = {SAVING: 200, RESUMING: 20}


class _NoLonger(Callback):
    """Kills the process at the end of the first chunk, if nothing has done so before."""

    def on_chunk_end(self, run, metrics):
        os.kill(os.getpid(), signal.SIGKILL)


def kill(folder: Path, times: int, rng: random.Random) -> Tally:
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    tally = Tally()
    straight = folder / "straight"
    assert _attempt(straight, None, rng) == 0, (straight / "err").read_text()
    rounds = 0
    while sum(tally.tried.values()) < times:
        resumed = folder / f"round-{rounds}"
        rounds += 1
        _round(resumed, straight, times, rng, tally)
        tried = sum(tally.tried.values())
        print(f"run {rounds} ended after {tried} faults, {len(tally.lost)} lost", flush=True)
    return tally


def _round(resumed: Path, straight: Path, times: int, rng: random.Random, tally: Tally) -> None:
    asked = []
    while True:
        done = sum(tally.tried.values()) >= times
        kind = None if done else rng.choice(KINDS)
        code = _attempt(resumed, kind, rng)
        problem = None
        if code == 0:  # it came to its end before it was hit
            try:
                check_same_run(resumed, straight, STEPS, asked=asked)
            except AssertionError:
                tally.add("comparison", f"{resumed.name}\n{traceback.format_exc()}")
            return
        expected = {"SIGTERM": 143, "SIGINT": 130}.get(kind or "", -signal.SIGKILL)
        if code != expected:
            problem = f"code {code} instead of {expected}: {(resumed / 'err').read_text()[-500:]}"
        elif code > 0:
            newest, problem = _saved(resumed)
            asked.append(newest)
        tally.add(kind or "unprovoked", problem)
        if problem is not None:
            return


def _saved(folder: Path) -> tuple[int, str | None]:
    """After a signal that lets the run save: the newest checkpoint's step, and what is wrong with
    it if it is not that of the last step that was told."""
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"]
    steps = [int(path.name[5:-5]) for path in (folder / "saved").glob("step-*.ckpt")]
    leftovers = [path.name for path in (folder / "saved").glob(".*")]
    newest = max(steps, default=0)
    if newest != last or leftovers:
        return newest, f"row {last}, checkpoint {newest}, leftovers {leftovers}"
    return newest, None


def _attempt(folder: Path, kind: str | None, rng: random.Random) -> int:
    """The exit code of a process, negative for a signal, as `subprocess` has it."""
    folder.mkdir(exist_ok=True)
    nth = rng.randint(1, CALLS[kind]) if kind in CALLS else None
    delay = rng.uniform(0, SECONDS)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of JAX's threads: there are none yet
        child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(os.open(folder / "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        _train(folder, nth, resuming=kind == RESUMING)
    os.close(writer)
    number = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
    if kind in number:
        _wait_for_a_chunk(reader)
        time.sleep(delay)
        os.kill(child, number[kind])
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status)


def _wait_for_a_chunk(reader: int) -> None:
    seen, deadline = b"", time.monotonic() + 120
    while b"running" not in seen:
        ready, _, _ = select.select([reader], [], [], max(0, deadline - time.monotonic()))
        data = os.read(reader, 4096) if ready else b""
        if not data:
            return  # it is over already
        seen += data


def _train(folder: Path, nth: int | None, *, resuming: bool) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        strategy, model, tasks = parts(boring=True)
        callbacks = [*[_NoLonger()] * resuming, *everything(folder, tasks)]
        trainer = em.Trainer(strategy, meta_batch_size=3, seed=1, callbacks=callbacks)
        disk = Disk(nth, lambda: os.kill(os.getpid(), signal.SIGKILL), opens=resuming)
        with disk.watched():
            trainer.fit(model, tasks, STEPS, resume="auto")
        code = 130 if trainer.stop_reason == "interrupted" else 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
