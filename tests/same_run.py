"""Whether two runs left the same. Nothing here wakes JAX: `tests.faults` forks after the import."""

import json
import struct

from tensorboardX.proto.event_pb2 import Event

from eqxmeta._checkpoint import read_manifest


def leaves_of(path):
    """The digest of every leaf in a checkpoint, by name."""
    return {leaf["path"]: leaf["sha256"] for leaf in read_manifest(path)["leaves"]}


def states_of(path):
    """What the callbacks left in a checkpoint, but for what tells a run from others."""
    states = read_manifest(path)["meta"]["callbacks"]
    return {**states, "Checkpoint": {k: v for k, v in states["Checkpoint"].items() if k != "run"}}


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


def check_same_run(resumed, straight, steps, *, same_files=True):
    """The files that two runs left agree: byte by byte where they hold no time and no name.

    Not `same_files`: one was asked to end, and saved at a step at which the other did not.
    """
    name = f"step-{steps:09}.ckpt"
    assert leaves_of(resumed / "saved" / name) == leaves_of(straight / "saved" / name)
    states = states_of(resumed / "saved" / name)
    wanted = states_of(straight / "saved" / name)
    if not same_files:  # the best of those saved may be that one
        del states["Checkpoint"], wanted["Checkpoint"]
    assert states == wanted, (states, wanted)
    assert states["Counter"]["rows"] == steps
    assert states["EarlyStopping"]["best"] is not None
    saved = [sorted(path.name for path in (run / "saved").iterdir()) for run in (resumed, straight)]
    assert saved[0] == saved[1] or not same_files

    log = (resumed / "log.jsonl").read_bytes()
    assert log == (straight / "log.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, steps + 1))

    events = events_of(resumed / "board")
    assert sorted(events) == sorted(events_of(straight / "board"))
    losses = [step for step, tag, _ in events if tag == "train/loss"]
    assert losses == list(range(1, steps + 1))
    # The sub-run of the newest adaptation curve.
    curve = events_of(resumed / "board" / "inner_steps")
    assert curve == events_of(straight / "board" / "inner_steps")
    assert len(curve) >= 3 * 2  # mean and both ends of the interval, before and after
