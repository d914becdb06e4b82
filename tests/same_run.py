"""Whether two runs left the same. Nothing here wakes JAX: `tests.faults` forks after the import."""

import json
import os
import struct

from tensorboardX.proto.event_pb2 import Event

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
    """`(step, tag, value)` of every scalar in the event files as they are, repetitions and all."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return [entry for entry in found if not entry[1].startswith(("custom_scalars", "_hparams_"))]


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
    agree("events", sorted(events), sorted(events_of(straight / "board")))
    losses = [step for step, tag, _ in events if tag == "train/loss"]
    agree("steps of events", losses, list(range(1, steps + 1)))
    # The sub-run of the newest adaptation curve.
    curve = events_of(resumed / "board" / "inner_steps")
    agree("newest curve", curve, events_of(straight / "board" / "inner_steps"))
    assert len(curve) >= 3 * 2  # mean and both ends of the interval, before and after


def expected_saves(rows, steps, asked):
    """What `Checkpoint` says of its best, and the names of the files that stay, from the rows of
    the log and the steps at which it has saved."""
    values = {row["step"]: row["eval/loss"]["mean"][-1] for row in rows if "eval/loss" in row}
    saved = sorted({*range(SAVE_EVERY, steps + 1, SAVE_EVERY), steps, *asked})
    best = min((step for step in saved if step in values), key=values.__getitem__)
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
