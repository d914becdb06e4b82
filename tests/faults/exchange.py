"""The folder of a run is moved, and another run begins in its place, at every call that touches the
disk; logs lose rows or get foreign ones between two runs."""

import json
import random
import warnings
from pathlib import Path

from eqxmeta import CheckpointInUse
from eqxmeta.callbacks import JSONL, Checkpoint, TensorBoard

from ..boring import Recorder, boring_fit, same_bits
from ..same_run import logged_steps
from .inject import Disk, Tally

STEPS, EVERY = 30, 10


def exchange(folder: Path, rng: random.Random, *, stride: int = 1, times: int = 200) -> Tally:
    tally = Tally()
    straight = boring_fit(STEPS)
    with _begun(folder / "whole") as disk:
        _fit(folder / "whole", STEPS)
    for nth in range(1, len(disk.calls) + 1, stride):
        problem = _moved(folder / str(nth), nth, straight)
        tally.add(f"moved at {disk.calls[nth - 1]}", problem and f"call {nth}: {problem}")
    for n in range(times):
        problem = _thinned(folder / f"thinned-{n}", rng)
        tally.add("thinned", problem and f"run {n}: {problem}")
    return tally


def _callbacks(folder: Path):
    logs = [JSONL(folder / "log.jsonl"), TensorBoard(folder, every=1)]
    return [*logs, Checkpoint(folder, every=EVERY, keep=1)]


def _fit(folder: Path, steps: int, *more):
    callbacks = [*more, *_callbacks(folder)]
    return boring_fit(steps, callbacks=callbacks, steps_per_execution=5, resume="auto")


def _begun(folder: Path, nth: int | None = None, act=None):
    """Counts from where the folder is there, and locked."""
    folder.mkdir(parents=True)
    return Disk(nth, act).watched()


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _moved(folder: Path, nth: int, straight) -> str | None:
    found: dict[str, bytes] = {}
    began = Recorder()

    def act():
        folder.rename(folder.with_name(f"{folder.name}-away"))
        _fit(folder, 2 * EVERY)
        found.update(_contents(folder))

    raised = None
    with _begun(folder, nth, act):
        try:
            state = _fit(folder, STEPS, began)
        except (CheckpointInUse, FileNotFoundError) as error:
            raised = error
        else:
            # What came after the last change is nobody's concern.
            if not same_bits(state, straight):
                return "another result"
    now = _contents(folder)
    if changed := [name for name in found if now.get(name) != found[name]]:
        return f"files of the other run are others: {changed}"
    if added := [name for name in now if name not in found]:
        return f"files were put into the other run's folder: {added}"
    if raised is None and began.events and began.rows[-1]["step"][-1] < STEPS:
        return "it ended early without an error"
    return None


def _thinned(folder: Path, rng: random.Random) -> str | None:
    _fit(folder, 2 * EVERY)
    log = folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    whole, kind = b"".join(lines), rng.choice(["delete", "double", "foreign", "shuffle", "nothing"])
    at = rng.randrange(1, len(lines))
    if kind == "delete":
        del lines[at : at + rng.randrange(1, 5)]
    elif kind == "double":
        lines.insert(rng.randrange(1, len(lines)), lines[at])
    elif kind == "foreign":
        lines.insert(at, b"what is this\n")
    elif kind == "shuffle":
        lines[at:] = lines[:0:-1][: len(lines) - at]
    changed = b"".join(dict.fromkeys(lines) if kind == "shuffle" else lines)
    log.write_bytes(changed)
    kept = {json.loads(x)["step"] for x in changed.splitlines() if x[:1] == b"{"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _fit(folder, STEPS)
    said = any("log.jsonl" in str(warning.message) for warning in told)
    if said != (changed != whole):
        return f"{kind}: {'a false alarm' if said else 'in silence'}"
    rows = [json.loads(x)["step"] for x in log.read_bytes().splitlines()]
    if rows != sorted(kept | {*range(2 * EVERY + 1, STEPS + 1)}):
        return f"{kind}: rows {rows}"
    lost = [x for x in changed.splitlines() if x not in log.read_bytes()]
    if lost and not (folder / "log.jsonl.stale").exists():
        return f"{kind}: removed without a copy: {lost}"
    if logged_steps(folder) != list(range(1, STEPS + 1)):
        return "the events are not those of the run"
    return None
