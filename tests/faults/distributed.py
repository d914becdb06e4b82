"""Runs of two processes of which one, or both, are ended from outside at random moments.

Every attempt is a pair with Checkpoint, TensorBoard, JSONL and Evaluate, over loopback. After a
kill the other process ends by itself. When attempts have brought a run to its end, both processes
have the parameters of an uninterrupted run, bitwise, and its files are what that leaves.
"""

import random
import signal
import time
import traceback
from pathlib import Path

from ..processes.pair import finish, said, start, wait_for
from ..same_run import check_same_run
from .inject import Tally
from .kill import _saved

STEPS = 300
SECONDS = 3.0  # in which an attempt is hit, after the first chunk
KINDS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
WHO = {"of the first": [0], "of the second": [1], "of both": [0, 1]}


def distributed(folder: Path, times: int, rng: random.Random) -> Tally:
    tally, straight, rounds = Tally(), folder / "straight", 0
    assert _attempt(straight, None, [], 0.0) == [0, 0], (straight / "err-0").read_text()
    while sum(tally.tried.values()) < times:
        rounds += 1
        _round(folder / f"round-{rounds}", straight, times, rng, tally)
        print(f"run {rounds} ended after {sum(tally.tried.values())} faults", flush=True)
    return tally


def _round(resumed: Path, straight: Path, times: int, rng: random.Random, tally: Tally) -> None:
    asked = []
    while True:
        done = sum(tally.tried.values()) >= times
        kind, who = rng.choice(list(KINDS)), rng.choice(list(WHO))
        hit = [] if done else WHO[who]
        codes = _attempt(resumed, KINDS[kind], hit, rng.uniform(0, SECONDS))
        if codes == [0, 0]:  # it came to its end before it was hit
            try:
                check_same_run(resumed, straight, STEPS, asked=asked)
                ends = [
                    said(run, index)["ended"] for run in (resumed, straight) for index in (0, 1)
                ]
                assert all(end == ends[0] for end in ends), ends
            except AssertionError:
                tally.add("comparison", f"{resumed.name}\n{traceback.format_exc()}")
            return
        problem = _unexpected(kind, hit, codes)
        if problem is None and kind == "SIGTERM":
            newest, problem = _saved(resumed)
            asked.append(newest)
        elif problem is not None:
            problem += "".join((resumed / f"err-{index}").read_text()[-800:] for index in (0, 1))
        tally.add(f"{kind} {who}", problem)
        if problem is not None:
            return


def _unexpected(kind: str, hit: list[int], codes: list[int]) -> str | None:
    if kind == "SIGTERM":  # the other ends as if it had been asked to
        sound = codes == [143 if index in hit else 0 for index in (0, 1)]
    else:
        sound = all((codes[i] == -signal.SIGKILL) == (i in hit) and codes[i] for i in (0, 1))
    return None if sound else f"codes {codes}\n"


def _attempt(folder: Path, number: int | None, hit: list[int], delay: float) -> list[int]:
    folder.mkdir(exist_ok=True)
    (folder / "steps").write_text(str(STEPS))
    started = start("faulted", folder)
    try:
        if hit and number is not None:
            wait_for(folder, "running", started)
            time.sleep(delay)
            for index in hit:
                started[index].send_signal(number)
        return finish(started)
    finally:
        for process in started:
            process.kill()
