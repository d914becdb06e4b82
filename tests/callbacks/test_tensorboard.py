"""What TensorBoard's own reader finds of a run, also of one that was broken off and resumed."""

import io
import math
import re
import signal
import struct
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

import eqxmeta as em
from eqxmeta._callback.callback import attach
from eqxmeta._callback.published import Curve, Histogram, Image
from eqxmeta.callbacks import Checkpoint, TensorBoard

from ..boring import boring_fit
from ..fake_run import chunk, fake_run, loss


def read(folder):
    sizes = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


def steps_of(folder, tag="train/loss"):
    reader = read(folder)
    return [s.step for s in reader.Scalars(tag)] if tag in reader.Tags()["scalars"] else []


def curve(k=2):
    return Curve(np.linspace(4.0, 1.0, k + 1), np.full(k + 1, 0.25))


def begun(folder, **options):
    """A callback that has begun a run, which it also hears."""
    callback = TensorBoard(folder, every=1)
    run = fake_run(callback, **options)
    callback.on_fit_start(run)
    return callback, run


def killed_run(folder, last):
    """A run with an evaluation every 10 steps that came to `last`, without its end."""
    callback, run = begun(folder)
    train(callback, run, 1, last)


def resumed_run(folder, start, last):
    """Goes on from a checkpoint at `start`, of which the callback was a part."""
    callback = TensorBoard(folder, every=1)
    callback.load_state_dict({})
    run = fake_run(callback, start=start, resuming=True)
    callback.on_fit_start(run)
    train(callback, run, start + 1, last)


def train(callback, run, first, last):
    for step in range(first, last + 1):
        chunk(run, callback, step, step)
        if step % 10 == 0:
            run.log({"eval/loss": curve()})


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*tfevents*"))}


@pytest.mark.parametrize("sizes", [(1, 2, 3), (70, 200)])
def test_every_step_reads_back(tmp_path, sizes):
    callback, run = begun(tmp_path)
    last = 0
    for size in sizes:
        chunk(run, callback, last + 1, last + size, zero=np.zeros(size, bool))
        last += size
    scalars = read(tmp_path).Scalars("train/loss")
    assert [s.step for s in scalars] == list(range(1, last + 1))
    assert np.array_equal([s.value for s in scalars], loss(np.arange(1, last + 1)))
    assert [s.value for s in read(tmp_path).Scalars("train/zero")] == [0.0] * last
    times = [s.wall_time for s in scalars]
    assert times == sorted(times)
    (path,) = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.step]
    assert len(events) == last  # one a step, with all its tags


def test_large_steps(tmp_path):
    callback, run = begun(tmp_path)
    chunk(run, callback, 2**31 - 1, 2**31 + 1)
    assert steps_of(tmp_path) == [2**31 - 1, 2**31, 2**31 + 1]


def test_it_thins_by_ten_and_does_not_stop_the_loop(tmp_path):
    callback = TensorBoard(tmp_path)
    assert callback.every is None
    attach([callback])
    run = fake_run()
    callback.on_fit_start(run)
    chunk(run, callback, 1, 13)
    chunk(run, callback, 14, 20)
    assert steps_of(tmp_path) == [10, 20]


def test_logged_values(tmp_path):
    _, run = begun(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for step in (10, 20):
        run.step = step
        run.log({"eval/loss": curve(), "lr": 0.5, "figure": Image(pixels)})
    run.log({"test/loss": curve(1)})
    main = read(tmp_path)
    for tag, value in [
        ("lr", 0.5),
        ("eval/loss", 1.0),
        ("within_task/eval/loss/after_0", 4.0),
        ("within_task/eval/loss/after_2", 1.0),
        ("within_task/eval/loss/ci95_low", 0.75),
        ("within_task/eval/loss/ci95_high", 1.25),
    ]:
        assert [(s.step, s.value) for s in main.Scalars(tag)] == [(10, value), (20, value)]
    assert [image.step for image in main.Images("figure")] == [10, 20]
    png = main.Images("figure")[0].encoded_image_string
    assert np.array_equal(np.round(matplotlib.image.imread(io.BytesIO(png)) * 255), pixels)
    inner = read(tmp_path / "inner_steps")  # the newest curves alone
    for end, shift in (("", 0), ("_low", -0.25), ("_high", 0.25)):
        values = [(s.step, s.value) for s in inner.Scalars(f"within_task/eval/loss{end}")]
        assert values == [(0, 4 + shift), (1, 2.5 + shift), (2, 1 + shift)]
    assert len(inner.Scalars("within_task/test/loss")) == 2


def test_what_matters_most_is_seen_first(tmp_path):
    callback, run = begun(tmp_path)
    metrics = ("loss_before", "accuracy", "accuracy_before", "support_loss/0", "grad_norm")
    chunk(run, callback, 1, 3, **{name: np.ones(3) for name in metrics})
    run.log({"eval/loss": curve(), "eval/accuracy": curve()})
    tags = sorted(read(tmp_path).Tags()["scalars"])
    tags += read(tmp_path / "inner_steps").Tags()["scalars"]
    assert tags[:5] == [
        "eval/accuracy",
        "eval/loss",
        "train/accuracy",
        "train/grad_norm",
        "train/loss",
    ]
    assert all(tag.startswith("within_task/") for tag in tags[5:])
    assert "within_task/train/loss_before" in tags and "within_task/train/support_loss/0" in tags


def test_one_layout_for_any_number_of_inner_steps(tmp_path):
    layouts = []
    for k in (1, 5):
        _, run = begun(tmp_path / str(k))
        for step in (10, 20):
            run.step = step
            run.log({"test/loss": curve(k)})
            run.log({"eval/loss": curve(k)})
        reader = read(tmp_path / str(k))
        tensors = reader.Tensors("custom_scalars__config__")
        assert len(tensors) == 2  # one for each new name, not one for each evaluation
        layouts.append(Layout.FromString(tensors[-1].tensor_proto.string_val[0]))
        tags = reader.Tags()["scalars"]
        bands, inner, points = layouts[-1].category
        for charts in (bands.chart, points.chart):
            assert [chart.title for chart in charts] == ["eval/loss", "test/loss"]
        for chart in bands.chart:
            (band,) = chart.margin.series
            assert {band.value, band.lower, band.upper} <= set(tags)
        newest = read(tmp_path / str(k) / "inner_steps").Tags()["scalars"]
        for chart in inner.chart:
            (band,) = chart.margin.series  # which TensorBoard does not smooth
            assert {band.value, band.lower, band.upper} <= set(newest)
        (expression,) = points.chart[0].multiline.tag
        found = [tag for tag in tags if re.match(expression, tag)]
        assert found == [f"within_task/eval/loss/after_{i}" for i in range(k + 1)]
    assert layouts[0] == layouts[1]


def test_no_point_is_nan(tmp_path):
    """As of `ProtoNet`, which predicts nothing before it has adapted."""
    callback, run = begun(tmp_path)
    bad = np.array([np.nan, 1.0, np.inf], np.float32)
    chunk(run, callback, 1, 3, loss_before=np.full(3, np.nan), bad=bad)
    run.log({"eval/loss": Curve(np.array([np.nan, 2.0]), np.array([np.nan, 0.5])), "x": np.nan})
    callback.on_fit_end(run)
    for folder in (tmp_path, tmp_path / "inner_steps"):
        reader = read(folder)
        values = [s.value for tag in reader.Tags()["scalars"] for s in reader.Scalars(tag)]
        assert values and not any(map(math.isnan, values))
    assert [(s.step, s.value) for s in read(tmp_path).Scalars("train/bad")] == [(2, 1), (3, np.inf)]
    assert [s.value for s in read(tmp_path).Scalars("eval/loss")] == [2.0]


def hparams_of(folder):
    content = read(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


CONFIG = {
    "seed": np.int64(3),
    "strategy": "MAML",
    "adapts": None,
    "tasks": "a | b",
    "fingerprint": "x",
}


def test_hparams_are_the_users_own_and_the_rest_is_text(tmp_path):
    own = {"sizes": [40, 40], "rate": 0.1, "flag": True, "width": 7}
    TensorBoard(tmp_path, hparams=own).on_fit_start(fake_run(config=CONFIG))
    assert hparams_of(tmp_path) == {"sizes": "[40, 40]", "rate": 0.1, "flag": True, "width": 7}
    (text,) = read(tmp_path).Tensors("configuration/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["| | |", "| --- | --- |"]
    assert {"| rate | 0.1 |", "| seed | 3 |", "| tasks | a \\| b |"} < set(lines)
    assert not any("fingerprint" in line or "adapts" in line for line in lines)


def test_without_hparams_the_run_is_told_in_a_few_words(tmp_path):
    TensorBoard(tmp_path).on_fit_start(fake_run(config=CONFIG))
    assert hparams_of(tmp_path) == {"seed": 3, "strategy": "MAML"}


def test_rate_and_speed_are_with_the_training_metrics(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr("eqxmeta.callbacks._tensorboard.time.time", lambda: next(clock, 7.0))
    callback, run = TensorBoard(tmp_path, every=1), fake_run()
    monkeypatch.setattr("eqxmeta.callbacks._tensorboard.EventFile", Quiet)
    run.examples = 500
    callback.on_fit_start(run)
    for first, last in ((1, 10), (11, 20)):
        chunk(run, callback, first, last)
    values = callback._file.values["train/examples_per_second"]
    assert values == [500 * 10 / 2.0] * 10  # of the second chunk: before the first it compiled


class Quiet:
    """In the place of an event file, what was added by tag."""

    def __init__(self, folder):
        self.path, self.size, self.values = folder / "x", 0, {}

    def add(self, step, values, wall_time=None):
        for value in values:
            self.values.setdefault(value.tag, []).append(value.simple_value)

    def flush(self):
        pass


def test_the_rate_that_is_injected_is_logged(tmp_path):
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    for optimizer, expected in (
        (optax.inject_hyperparams(optax.sgd)(schedule), [0.5, 0.4, 0.3]),
        (optax.sgd(schedule), None),
    ):
        strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optimizer)
        folder = tmp_path / str(expected is None)
        boring_fit(3, strategy=strategy, callbacks=[TensorBoard(folder, every=1)])
        tags = read(folder).Tags()["scalars"]
        assert ("train/learning_rate" in tags) == (expected is not None)
        if expected:
            found = [s.value for s in read(folder).Scalars("train/learning_rate")]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("torn", [0, 1, 11, 13, 40])
def test_a_resumed_run_has_every_step_once_and_changes_no_file(tmp_path, torn):
    killed_run(tmp_path, 35)
    (path,) = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[: -torn or None])
    for start, last in ((20, 40), (30, 33), (30, 42), (40, 45)):
        before = files_of(tmp_path)
        resumed_run(tmp_path, start, last)
        assert files_of(tmp_path).items() >= before.items()
    reader = read(tmp_path)
    assert [s.step for s in reader.Scalars("train/loss")] == list(range(1, 46))
    assert [s.step for s in reader.Scalars("eval/loss")] == [10, 20, 30, 40]
    assert len(reader.Tensors("custom_scalars__config__")) >= 1
    assert "_hparams_/session_start_info" in reader.PluginTagToContent("hparams")


def test_a_tensorboard_that_is_running_forgets_too(tmp_path):
    killed_run(tmp_path, 15)
    reader = read(tmp_path)
    resumed_run(tmp_path, 10, 12)
    assert [s.step for s in reader.Reload().Scalars("train/loss")] == list(range(1, 13))


@pytest.mark.parametrize("shift", [0, -3600, -(10**8)])
def test_a_clock_that_stands_still_or_goes_back(tmp_path, monkeypatch, shift):
    now = time.time()
    killed_run(tmp_path, 15)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + shift)
        resumed_run(tmp_path, 10, 25)
        resumed_run(tmp_path, 20, 30)
    assert len(list(tmp_path.glob("*tfevents*"))) == 3
    assert steps_of(tmp_path) == list(range(1, 31))
    assert len(steps_of(tmp_path / "inner_steps", "within_task/eval/loss")) == 3


@pytest.mark.parametrize("stamp", ["9999999999", "99999999999", "9" * 99, "0", "4000000000"])
def test_whatever_the_stamp_of_a_file_the_next_is_read_after_it(tmp_path, stamp):
    killed_run(tmp_path, 15)
    (path,) = tmp_path.glob("*tfevents*")
    path.rename(tmp_path / f"events.out.tfevents.{stamp}.host")
    for start in (10, 12, 14):
        resumed_run(tmp_path, start, start + 10)
    assert len(list(tmp_path.glob("*tfevents*"))) == 4
    assert steps_of(tmp_path) == list(range(1, 25))


def test_a_run_that_begins_again_hides_the_attempt_before(tmp_path):
    callback, run = begun(tmp_path)
    run.log({"early": 1.0})
    chunk(run, callback, 1, 8)
    before = files_of(tmp_path)
    callback, run = begun(tmp_path, resuming=True)
    chunk(run, callback, 1, 3)
    assert steps_of(tmp_path) == [1, 2, 3]
    assert steps_of(tmp_path, "early") == []
    assert files_of(tmp_path).items() > before.items()


@pytest.mark.parametrize("start", [0, 10])
def test_the_files_of_other_writers_are_left_alone(tmp_path, start):
    killed_run(tmp_path, 15)
    data = next(tmp_path.glob("*tfevents*")).read_bytes()
    foreign = [  # of tensorboardX, PyTorch, TensorFlow; and of another run further below
        "events.out.tfevents.1700000000.host",
        "events.out.tfevents.4000000000.host.4711.0",
        "mine.tfevents",
        "validation/events.out.tfevents.1700000000.host.4711.1.v2",
        "inner_steps/events.out.tfevents.1700000000.host",
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = files_of(tmp_path)
    resumed_run(tmp_path, start, 20)
    assert files_of(tmp_path).items() > before.items()


def gone(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


def thinned(path):
    data = path.read_bytes()
    path.write_bytes(data[:200] + data[300:])


@pytest.mark.parametrize("change", [gone, emptied, thinned])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.filterwarnings("ignore:(?s).*(of another run|cannot show)")
def test_events_that_are_gone_are_told_of_with_their_steps(tmp_path, change, which):
    board = tmp_path / "board"
    for steps, resume in ((10, None), (20, "auto"), (30, "auto")):
        if steps == 30:
            file = sorted(board.iterdir())[which]
            change(file)
            told = rf"(?s)lacks events.*{file.name}.*the steps {10 * which + 1}-{10 * which + 10}\."
            with pytest.warns(RuntimeWarning, match=told):
                callbacks = [TensorBoard(board, every=1), Checkpoint(tmp_path / "saved", every=10)]
                boring_fit(steps, callbacks=callbacks, resume=resume)
            continue
        callbacks = [TensorBoard(board, every=1), Checkpoint(tmp_path / "saved", every=10)]
        boring_fit(steps, callbacks=callbacks, resume=resume)
    assert set(range(21, 31)) <= set(steps_of(board))


@pytest.mark.parametrize("shift", [-3600, -(10**8)])
def test_a_clock_that_goes_back_during_runs_and_between_them(tmp_path, monkeypatch, shift):
    """At every look at the clock it is earlier than at the one before."""
    now = [time.time()]

    def clock():
        now[0] += shift / 1000
        return now[0]

    monkeypatch.setattr(time, "time", clock)
    for steps in (70, 130, 200):
        callbacks = [
            TensorBoard(tmp_path / "board", every=1),
            Checkpoint(tmp_path / "saved", every=50),
        ]
        boring_fit(steps, callbacks=callbacks, resume="auto", steps_per_execution=10)
        for path in (tmp_path / "saved").glob(f"step-*{steps}.ckpt"):
            if steps < 200:
                path.unlink()  # so that steps are taken again
    assert steps_of(tmp_path / "board") == list(range(1, 201))
    times = [s.wall_time for s in read(tmp_path / "board").Scalars("train/loss")]
    assert times[0] > times[-1]  # that is the clock's


def record(event: bytes, length: int | None = None) -> bytes:
    head = struct.pack("<Q", len(event) if length is None else length)
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, event)]
    return head + sums[0] + event + sums[1]


@pytest.mark.parametrize("where", ["before", "after", "within"])
@pytest.mark.parametrize("kind", ["claims", "no record", "folder"])
def test_what_tensorboard_cannot_read_is_told_of_and_gone_round(tmp_path, kind, where):
    killed_run(tmp_path, 15)
    (path,) = tmp_path.glob("*tfevents*")
    # A sound checksum over a size that no file has, and over what is no event.
    data = record(b"x" * 20, 2**62) if kind == "claims" else record(b"\xff" * 20)
    if where == "within":
        if kind == "folder":
            pytest.skip("a folder is not within a file")
        bad = path
        bad.write_bytes(bad.read_bytes() + data)
    else:
        bad = path.with_name(f"{path.name}.z" if where == "after" else "a.tfevents")
        bad.mkdir() if kind == "folder" else bad.write_bytes(data)
    before = files_of(tmp_path) if kind != "folder" else {}
    with pytest.warns(RuntimeWarning, match=f"(?s){bad.name} is in it.*Received.*move it away"):
        resumed_run(tmp_path, 10, 20)
    assert files_of(tmp_path).items() >= before.items() if before else bad.is_dir()
    bad.rename(tmp_path / "away")
    assert steps_of(tmp_path) == list(range(11 if where == "within" else 1, 21))


def test_another_run_is_not_touched(tmp_path):
    killed_run(tmp_path, 5)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"(?s)holds a run.*Received:.*resume='auto'"):
        TensorBoard(tmp_path).on_fit_start(fake_run())
    assert files_of(tmp_path) == before


def test_nothing_is_lost_by_kill_minus_nine(tmp_path):
    code = f"""
import os, signal, sys
import numpy as np
from eqxmeta.callbacks import TensorBoard
from tests.fake_run import fake_run
callback = TensorBoard({str(tmp_path)!r}, every=1)
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


def test_a_full_disk_costs_nothing_that_was_written(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    callback, run = begun(tmp_path)
    chunk(run, callback, 1, 20)
    size = callback.state_dict() and sum(map(len, files_of(tmp_path).values()))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))  # some records, and a part
        with pytest.raises(OSError, match="too large"):
            chunk(run, callback, 21, 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_of(tmp_path) == list(range(1, 21))
    callback.on_exception(run, OSError())  # there is room again
    assert steps_of(tmp_path) == list(range(1, 41))
    resumed_run(tmp_path, 10, 15)
    assert steps_of(tmp_path) == list(range(1, 16))


def test_logging_after_the_end_is_not_lost(tmp_path):
    callback, run = begun(tmp_path)
    chunk(run, callback, 1, 3)
    callback.on_fit_end(run)
    run.log({"last": 2.0})
    assert steps_of(tmp_path, "last") == [3]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="every"):
        TensorBoard("runs", every=0)
    with pytest.raises(TypeError, match="hparams"):
        TensorBoard("runs", hparams={1: 2})  # pyright: ignore
    assert TensorBoard("runs").writes


def test_without_pillow_a_picture_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    _, run = begun(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.warns(RuntimeWarning, match=r"(?s)leaves out the picture 'p'.*pip install pillow"):
        run.log({"p": Image(np.zeros((2, 2, 3), np.uint8)), "x": 1.0})
    assert read(tmp_path).Tags()["images"] == []
    assert len(read(tmp_path).Scalars("x")) == 1


@pytest.mark.parametrize(
    "values",
    [
        [-np.inf, 0.0, 1.0, 1.0, np.nan],
        [-1.7e308, 1.7e308],  # wider than any number
        [1e20, 1e20],  # narrower than its buckets could be
        [1.0, np.nextafter(1.0, 2.0)],
        [0.5, 0.5, 0.5],
    ],
)
def test_histograms_of_numbers_that_are_not_ordinary(tmp_path, values):
    callback, run = begun(tmp_path)
    run.log({"parameters": Histogram(np.array(values)), "none": Histogram(np.array([np.inf]))})
    callback.on_fit_end(run)
    with np.errstate(over="ignore"):  # in TensorBoard's own sums
        reader = read(tmp_path)
    assert reader.Tags()["histograms"] == ["parameters"]
    histogram = reader.Histograms("parameters")[0].histogram_value
    finite = [x for x in values if np.isfinite(x)]
    assert (histogram.min, histogram.max) == (min(finite), max(finite))
    assert sum(histogram.bucket) == histogram.num == len(finite)
    limits = list(histogram.bucket_limit)
    assert limits == sorted(limits) and limits[0] <= min(finite) and max(finite) <= limits[-1]


def test_a_second_try_is_all_that_is_shown(tmp_path):
    killed_run(tmp_path, 20)
    before = files_of(tmp_path)
    callback = TensorBoard(tmp_path, every=1, overwrite=True)
    run = fake_run(callback)
    with pytest.warns(
        RuntimeWarning, match="begins anew: TensorBoard shows no more of what was in"
    ):
        callback.on_fit_start(run)
    train(callback, run, 1, 5)
    callback.on_fit_end(run)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert files_of(tmp_path).items() >= before.items()
