import io
import os
import shutil
import signal
import struct
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from eqxmeta._callback.callback import attach
from eqxmeta._callback.published import Curve, Histogram, Image
from eqxmeta.callbacks import TensorBoard

from ..fake_run import chunk, fake_run, loss


def records(folder):
    """Every event of the run, in the order of the files; the checksums are checked."""
    events = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            head, (size,) = data[:8], struct.unpack("<Q", data[:8])
            event, tail = data[12 : 12 + size], data[12 + size : 16 + size]
            assert data[8:12] == struct.pack("<I", masked_crc32c(head))
            assert tail == struct.pack("<I", masked_crc32c(event))
            events.append(Event.FromString(event))
            data = data[16 + size :]
    return events


def steps_of(folder, tag="train/loss"):
    return [e.step for e in records(folder) if tag in {v.tag for v in e.summary.value}]


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def curve(k=2):
    return Curve(np.linspace(4.0, 1.0, k + 1), np.full(k + 1, 0.25))


@pytest.mark.parametrize("sizes", [(1, 2, 3), (70, 200)])
def test_every_step_reads_back_in_tensorboard(tmp_path, sizes):
    callback = TensorBoard(tmp_path)
    run = fake_run()
    callback.on_fit_start(run)
    last = 0
    for size in sizes:
        zero = np.zeros(size, np.float32)
        chunk(run, callback, last + 1, last + size, zero=zero)
        last += size
    scalars = read(tmp_path).Scalars("train/loss")
    assert [s.step for s in scalars] == list(range(1, last + 1))
    assert np.array_equal([s.value for s in scalars], loss(np.arange(1, last + 1)))
    assert [s.value for s in read(tmp_path).Scalars("train/zero")] == [0.0] * last
    times = [s.wall_time for s in scalars]
    assert times == sorted(times)
    assert len(steps_of(tmp_path)) == last  # one event a step, its checksum right


def test_large_steps(tmp_path):
    callback = TensorBoard(tmp_path)
    run = fake_run()
    callback.on_fit_start(run)
    chunk(run, callback, 2**31 - 1, 2**31 + 1)
    assert [s.step for s in read(tmp_path).Scalars("train/loss")] == [2**31 - 1, 2**31, 2**31 + 1]


def test_every_thins_and_does_not_stop_the_loop(tmp_path):
    callback = TensorBoard(tmp_path, every=4)
    assert callback.every is None
    attach([callback])
    run = fake_run()
    callback.on_fit_start(run)
    chunk(run, callback, 1, 3)
    chunk(run, callback, 4, 9)
    assert steps_of(tmp_path) == [4, 8]


def test_published_values(tmp_path):
    callback = TensorBoard(tmp_path)
    run = fake_run(callback)
    callback.on_fit_start(run)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for step in (10, 20):
        run.step = step
        run.log({"eval/loss": curve(), "lr": 0.5, "figure": Image(pixels)})
    run.log({"test/loss": curve(1)})
    main = read(tmp_path)
    for tag, value in [
        ("lr", 0.5),
        ("eval/loss/after_0", 4.0),
        ("eval/loss/after_2", 1.0),
        ("ci95/eval/loss/after_2_low", 0.75),
        ("ci95/eval/loss/after_2_high", 1.25),
    ]:
        assert [(s.step, s.value) for s in main.Scalars(tag)] == [(10, value), (20, value)]
    png = main.Images("figure")[0].encoded_image_string
    assert np.array_equal(np.round(matplotlib.image.imread(io.BytesIO(png)) * 255), pixels)
    (_,) = (tmp_path / "inner_steps").iterdir()  # the newest evaluation's
    assert next(e.step for e in records(tmp_path / "inner_steps") if e.HasField("session_log")) == 0
    inner = read(tmp_path / "inner_steps")
    for tag, shift in (("", 0), ("_low", -0.25), ("_high", 0.25)):
        values = [(s.step, s.value) for s in inner.Scalars(f"adaptation/eval/loss{tag}")]
        assert values == [(0, 4 + shift), (1, 2.5 + shift), (2, 1 + shift)]


def test_layout_names_every_curve_and_tags_that_exist(tmp_path):
    callback = TensorBoard(tmp_path)
    run = fake_run(callback)
    callback.on_fit_start(run)
    for step in (10, 20):
        run.step = step
        run.log({"eval/loss": curve()})
        run.log({"test/loss": curve(1)})
    accumulator = read(tmp_path)
    layouts = accumulator.Tensors("custom_scalars__config__")
    assert len(layouts) == 2  # one for each new name, not one for each evaluation
    newest = Layout.FromString(layouts[-1].tensor_proto.string_val[0])
    charts = {chart.title: chart.margin.series for chart in newest.category[0].chart}
    assert {title: len(series) for title, series in charts.items()} == {
        "eval/loss": 3,
        "test/loss": 2,
    }
    for series in charts.values():
        for line in series:
            assert {line.value, line.lower, line.upper} <= set(accumulator.Tags()["scalars"])


def test_hparams_drop_nothing(tmp_path):
    config = {"seed": np.int64(3), "name": "sine", "none": None}
    callback = TensorBoard(tmp_path, hparams={"sizes": [40, 40], "rate": 0.1, "flag": True})
    callback.on_fit_start(fake_run(config=config))
    content = read(tmp_path).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = {
        key: getattr(value, value.WhichOneof("kind"))
        for key, value in HParamsPluginData.FromString(content).session_start_info.hparams.items()
    }
    expected = {"seed": 3, "name": "sine", "none": "None", "sizes": "[40, 40]", "rate": 0.1}
    assert values == {**expected, "flag": True}


def killed_run(folder, last):
    """A run with an evaluation every 10 steps that came to `last`, without its end."""
    callback = TensorBoard(folder)
    run = fake_run(callback)
    callback.on_fit_start(run)
    for step in range(1, last + 1):
        chunk(run, callback, step, step)
        if step % 10 == 0:
            run.log({"eval/loss": curve()})


def part_of_it(folder):
    """Resumed from a checkpoint that it was part of."""
    callback = TensorBoard(folder)
    callback.load_state_dict({})
    return callback


@pytest.mark.parametrize("torn", [0, 1, 11, 13, 40])
def test_resume_has_every_step_once(tmp_path, torn):
    killed_run(tmp_path, 35)
    (path,) = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[: -torn or None])
    for start, last in ((20, 40), (40, 45)):
        callback = part_of_it(tmp_path)
        run = fake_run(callback, start=start, resuming=True)
        callback.on_fit_start(run)
        chunk(run, callback, start + 1, last)
        callback.on_fit_end(run)
    assert steps_of(tmp_path) == list(range(1, 46))
    assert steps_of(tmp_path, "eval/loss/after_2") == [10, 20]
    assert len(steps_of(tmp_path, "_hparams_/session_start_info")) == 1
    starts = [e.step for e in records(tmp_path) if e.HasField("session_log")]
    assert starts == [21, 41]  # what a TensorBoard that is running is told to forget
    assert [s.step for s in read(tmp_path).Scalars("train/loss")] == list(range(1, 46))


@pytest.mark.parametrize(("start", "newest"), [(29, []), (30, [0, 1, 2])])
def test_resume_forgets_a_curve_of_a_later_step(tmp_path, start, newest):
    killed_run(tmp_path, 35)
    part_of_it(tmp_path).on_fit_start(fake_run(start=start, resuming=True))
    assert steps_of(tmp_path / "inner_steps", "adaptation/eval/loss") == newest


def test_a_resumed_run_that_is_killed_while_it_cuts_leaves_no_step_twice(tmp_path, monkeypatch):
    folder, killed = tmp_path / "run", tmp_path / "killed"
    killed_run(folder, 15)

    def keep(descriptor):  # what there would be if the process ended at the first of these
        if not killed.exists():
            shutil.copytree(folder, killed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", keep)
        part_of_it(folder).on_fit_start(fake_run(start=10, resuming=True))
    (temporary,) = killed.glob(".*.tmp")
    assert [s.step for s in read(killed).Scalars("train/loss")] == list(range(1, 16))
    part_of_it(killed).on_fit_start(fake_run(start=10, resuming=True))
    assert [s.step for s in read(killed).Scalars("train/loss")] == list(range(1, 11))
    assert not temporary.exists()


@pytest.mark.parametrize(("offset", "lost"), [(13, [15]), (3, list(range(15, 31)))])
def test_resume_leaves_out_what_is_damaged_and_says_so(tmp_path, offset, lost):
    killed_run(tmp_path, 30)
    (path,) = tmp_path.glob("*tfevents*")
    data, start = bytearray(path.read_bytes()), 0
    while True:
        (size,) = struct.unpack_from("<Q", data, start)
        if Event.FromString(bytes(data[start + 12 : start + 12 + size])).step == 15:
            break
        start += 16 + size
    data[start + offset] ^= 1  # in the event, or in its length
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning) as warned:
        part_of_it(tmp_path).on_fit_start(fake_run(start=30, resuming=True))
    assert steps_of(tmp_path) == [step for step in range(1, 31) if step not in lost]
    (stale,) = tmp_path.glob("*.stale")
    assert stale.read_bytes() == data and "tfevents" not in stale.name
    told = [str(w.message) for w in warned]
    assert stale.name in told[0]
    assert ["step 14 as the newest" in text for text in told[1:]] == [True] * (len(lost) > 1)


def test_resume_keeps_earlier_steps_that_come_later_in_the_file(tmp_path):
    callback = TensorBoard(tmp_path)
    run = fake_run(callback)
    callback.on_fit_start(run)
    chunk(run, callback, 1, 30)
    run.step = 7
    run.log({"late": 1.0})
    part_of_it(tmp_path).on_fit_start(fake_run(start=10, resuming=True))
    assert steps_of(tmp_path) == list(range(1, 11))
    assert steps_of(tmp_path, "late") == [7]


def test_resume_from_the_beginning_writes_everything_anew(tmp_path):
    for resuming in (False, True):
        callback = TensorBoard(tmp_path)
        run = fake_run(callback, resuming=resuming)
        callback.on_fit_start(run)
        run.log({"eval/loss": curve()})
        chunk(run, callback, 1, 3)
    assert steps_of(tmp_path) == [1, 2, 3]
    assert steps_of(tmp_path, "eval/loss/after_0") == [0]
    assert steps_of(tmp_path / "inner_steps", "adaptation/eval/loss") == [0, 1, 2]
    assert len(steps_of(tmp_path, "_hparams_/session_start_info")) == 1


@pytest.mark.parametrize("start", [0, 10])
def test_resume_leaves_the_files_of_other_writers_alone(tmp_path, start):
    killed_run(tmp_path, 15)
    ours = tmp_path.glob("*tfevents*")
    data = next(ours).read_bytes()
    foreign = [  # of tensorboardX, PyTorch, TensorFlow; and of another run further below
        "events.out.tfevents.1700000000.host.0000",
        "events.out.tfevents.1700000000.host.4711.0",
        "validation/events.out.tfevents.1700000000.host.4711.1.v2",
        "inner_steps/events.out.tfevents.1700000000.host.step-99",
        "other/events.out.tfevents.1700000000.host.0000.eqxmeta",
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    callback = part_of_it(tmp_path)
    run = fake_run(callback, start=start, resuming=True)
    callback.on_fit_start(run)
    chunk(run, callback, start + 1, 20)
    run.log({"eval/loss": curve()})
    callback.on_fit_end(run)
    assert all((tmp_path / name).read_bytes() == data for name in foreign)
    (tmp_path / foreign[0]).unlink()
    (tmp_path / foreign[1]).unlink()
    assert steps_of(tmp_path) == list(range(1, 21))
    assert len(steps_of(tmp_path, "_hparams_/session_start_info")) == 1


def test_another_run_is_not_touched(tmp_path):
    killed_run(tmp_path, 5)
    before = {p: p.read_bytes() for p in tmp_path.glob("*tfevents*")}
    with pytest.raises(FileExistsError, match=r"(?s)holds a run.*Received:.*resume='auto'"):
        TensorBoard(tmp_path).on_fit_start(fake_run())
    assert {p: p.read_bytes() for p in tmp_path.glob("*tfevents*")} == before


def test_nothing_is_lost_by_kill_minus_nine(tmp_path):
    code = f"""
import os, signal, sys
import numpy as np
from eqxmeta.callbacks import TensorBoard
from tests.fake_run import fake_run
callback = TensorBoard({str(tmp_path)!r})
run = fake_run(config={{}})
callback.on_fit_start(run)
for first in range(1, 501, 100):
    steps = np.arange(first, first + 100)
    callback.on_chunk_end(run, {{"step": steps, "loss": steps.astype(np.float32)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert steps_of(tmp_path) == list(range(1, 501))


def test_publishing_after_the_end_is_not_lost(tmp_path):
    callback = TensorBoard(tmp_path)
    run = fake_run(callback)
    callback.on_fit_start(run)
    chunk(run, callback, 1, 3)
    callback.on_fit_end(run)
    run.log({"last": 2.0})
    assert steps_of(tmp_path, "last") == [3]
    assert not [e for e in records(tmp_path) if e.HasField("session_log")]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="every"):
        TensorBoard("runs", every=0)
    with pytest.raises(TypeError, match="hparams"):
        TensorBoard("runs", hparams={1: 2})  # pyright: ignore
    assert TensorBoard("runs").writes


@pytest.mark.parametrize(
    "values",
    [
        [-np.inf, 0.0, 1.0, 1.0, np.nan],
        [-1.7e308, 1.7e308],  # wider than any number
        [1e20, 1e20],  # narrower than its buckets could be
        [0.5, 0.5, 0.5],
    ],
)
def test_histograms_of_numbers_that_are_not_ordinary(tmp_path, values):
    callback = TensorBoard(tmp_path)
    run = fake_run(callback)
    callback.on_fit_start(run)
    run.log({"parameters": Histogram(np.array(values)), "none": Histogram(np.array([np.inf]))})
    callback.on_fit_end(run)
    found = [v for e in records(tmp_path) for v in e.summary.value if v.HasField("histo")]
    (histogram,) = [v.histo for v in found]
    finite = [x for x in values if np.isfinite(x)]
    assert (histogram.min, histogram.max) == (min(finite), max(finite))
    assert sum(histogram.bucket) == histogram.num == len(finite)
    limits = list(histogram.bucket_limit)
    assert limits == sorted(limits) and limits[0] <= min(finite) and max(finite) <= limits[-1]
