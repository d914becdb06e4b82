"""Whether two runs left the same. Nothing here wakes JAX: `tests.faults` forks after the import."""

import json
import os

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eqxmeta._checkpoint.save_load import read_manifest

from .resume_run import KEEP, SAVE_EVERY


def leaves_of(path):
    """The digest of every leaf in a checkpoint, by name."""
    return {leaf["path"]: leaf["sha256"] for leaf in read_manifest(path)["leaves"]}


def states_of(path):
    """What the callbacks left in a checkpoint."""
    return read_manifest(path)["meta"]["callbacks"]


def rest_of(path):
    """What else is in a checkpoint, but for what names the run, and how long it was to be."""
    manifest = read_manifest(path)
    meta = {k: v for k, v in manifest["meta"].items() if k not in ("run", "callbacks")}
    meta["config"] = {k: v for k, v in meta["config"].items() if k != "steps"}
    return {**manifest, "meta": meta, "leaves": None}


def events_of(folder):
    """`(tag, step, value)` of every scalar that TensorBoard's own reader finds, in its order; not
    of the speed, which is the clock's."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = sorted(set(reader.Tags()["scalars"]) - {"train/examples_per_second"})
    return [(tag, event.step, event.value) for tag in tags for event in reader.Scalars(tag)]


def logged_steps(folder, tag="train/loss"):
    """The steps of a scalar that TensorBoard's own reader finds."""
    return [step for name, step, _ in events_of(folder) if name == tag]


def check_same_run(resumed, straight, steps, *, asked=()):
    """The files that two runs left agree: byte by byte where they hold no time and no name.

    `asked`: the steps at which the one was asked to end, and saved where the other did not.
    """
    log = (resumed / "log.jsonl").read_bytes()
    rows = [json.loads(line) for line in log.splitlines()]
    agree("rows", rows, [json.loads(x) for x in (straight / "log.jsonl").read_bytes().splitlines()])
    assert log == (straight / "log.jsonl").read_bytes()
    agree("steps of rows", [row["step"] for row in rows], list(range(1, steps + 1)))

    last = f"step-{steps:09}.ckpt"
    states = [states_of(run / "saved" / last) for run in (resumed, straight)]
    for run, state, extra in zip((resumed, straight), states, (asked, ()), strict=True):
        best, files = expected_saves(rows, steps, extra)
        agree(f"best of {run.name}", state.pop("Checkpoint"), best)
        agree(f"files of {run.name}", sorted(os.listdir(run / "saved")), files)
        assert state.pop("TensorBoard")["log"] in os.listdir(run / "board")  # its file's name
    agree("states of callbacks", *states)
    assert states[0]["Counter"]["rows"] == steps
    assert states[0]["EarlyStopping"]["best"] is not None
    both = [name for name in os.listdir(resumed / "saved") if (straight / "saved" / name).exists()]
    assert last in both
    for name in both:
        agree(
            f"leaves of {name}", *(leaves_of(run / "saved" / name) for run in (resumed, straight))
        )
        agree(f"rest of {name}", *(rest_of(run / "saved" / name) for run in (resumed, straight)))

    events = events_of(resumed / "board")
    agree("events", events, events_of(straight / "board"))
    agree("steps of events", logged_steps(resumed / "board"), list(range(1, steps + 1)))
    # The sub-run of the newest adaptation curve.
    curve = events_of(resumed / "board" / "inner_steps")
    agree("newest curve", curve, events_of(straight / "board" / "inner_steps"))
    assert len(curve) >= 3 * 2  # mean and both ends of the interval, before and after


def expected_saves(rows, steps, asked):
    """What `Checkpoint` says of its best, and the names of the files that stay, from the rows of
    the log and the steps at which it has saved."""
    values = {row["step"]: row["eval/loss"]["mean"][-1] for row in rows if "eval/loss" in row}
    due = range(SAVE_EVERY, steps + 1, SAVE_EVERY)  # of which one may be the best
    saved = sorted({*due, steps, *asked})
    best = min((step for step in due if step in values), key=values.__getitem__)
    state = {"best_step": best, "best_value": values[best]}
    stay = {*saved[-KEEP:], best}
    files = [f"step-{step:09}.ckpt" for step in sorted(stay)]
    return {"monitor": "eval/loss", "mode": "min", **state}, files


def agree(what, got, wanted):
    """As `assert`, with what differs and no more: this is read when a run of hours has failed."""
    if isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        got, wanted = dict(enumerate(got)), dict(enumerate(wanted))
    if isinstance(got, dict) and got.keys() == wanted.keys():
        differ = [key for key in got if got[key] != wanted[key]]
        got, wanted = {k: got[k] for k in differ[:5]}, {k: wanted[k] for k in differ[:5]}
    assert got == wanted, f"{what}: {str(got)[:2000]} instead of {str(wanted)[:2000]}"
