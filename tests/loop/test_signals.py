"""What a signal does while something takes its time, in this process: `test_hang` has the rest."""

import asyncio
import hashlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import jax
import pytest

import eqxmeta as em
from eqxmeta._loop.announce import Clock
from eqxmeta.callbacks import JSONL, Checkpoint

from ..boring import BoringStrategy, BoringTasks, Recorder, at, boring_fit, host_batch, same_bits


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr("eqxmeta._loop.signals.leave", lambda code: None)
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    wake = signal.getsignal(signal.SIGURG)
    yield
    assert {number: signal.getsignal(number) for number in numbers} == numbers
    assert signal.getsignal(signal.SIGURG) == wake
    assert signal.set_wakeup_fd(-1) == -1
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("eqxmeta._loop.signals.say", lines.append)
    monkeypatch.setattr("eqxmeta._loop.hooks.say", lines.append)
    monkeypatch.setattr("eqxmeta._loop.announce.say", lines.append)
    return lines


@pytest.fixture
def forever():
    """An event for which one waits for ever; of the test."""
    event = threading.Event()
    yield event
    event.set()


def send(number):
    return lambda run: os.kill(os.getpid(), number)


def later(number, seconds=0.2):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def without_handlers():
    """As in a compiler: no handler runs in the main thread meanwhile. About half a second."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)


# What is said, and when.


def test_it_is_said_while_no_handler_can_run(said):
    order = []

    def compile(run):
        later(signal.SIGINT, 0.05)
        without_handlers()
        order.extend([*said, "compiled"])

    state = boring_fit(40, callbacks=[Recorder(every=10, act=at("on_step_end", 10, compile))])
    assert int(state.step) == 10
    now = "(now: recorder.on_step_end)"
    told = f"Ctrl-C: the run ends after what is under way {now}, with all it reached. "
    assert order == [f"{told}Again: it ends at once.", "compiled"]
    assert said == order[:1]


def test_whoever_had_the_wakeup_fd_hears_of_it_too_and_has_it_back():
    read, write = os.pipe()
    for end in read, write:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write)
    boring_fit(40, callbacks=[Recorder(every=10, act=at("on_step_end", 10, send(signal.SIGINT)))])
    assert signal.set_wakeup_fd(-1) == write
    assert signal.SIGINT in os.read(read, 99)
    os.close(read)
    os.close(write)


def test_an_event_loop_hears_of_its_own_signals():
    # As in a notebook: the run is within a loop that learns of signals by the wakeup fd.
    async def main():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, True)
        boring_fit(20, callbacks=[Recorder(every=10, act=at("on_step_end", 10, usr1))])
        await asyncio.sleep(0.01)

    heard, usr1 = [], send(signal.SIGUSR1)
    asyncio.run(main())
    assert heard[0]


def test_a_stderr_that_is_closed_costs_nothing(monkeypatch):
    for stream in None, open(os.devnull, "w"):  # noqa: SIM115
        if stream:
            stream.close()
        monkeypatch.setattr("sys.stderr", stream)
        press = Recorder(every=10, act=at("on_step_end", 10, send(signal.SIGINT)))
        assert int(boring_fit(40, callbacks=[press]).step) == 10


def test_a_clock_now_and_then_where_no_bar_shows_it(said):
    clock, compiling = Clock(talk=True), ("compiling", 100.0, True)
    for second in range(0, 200):
        clock.tick(100.0 + second, compiling, None)
    clock.tick(110.0, ("a hook", 100.0, False), None)
    lines = ["0:10", "0:30", "1:00", "2:00", "3:00"]
    assert said == [f"compiling {time}" for time in lines]
    clock.tick(210.0, ("compiling", 200.0, True), None)  # another one
    assert said[5:] == ["compiling 0:10"]
    Clock(talk=False).tick(210.0, compiling, None)
    shown = []
    for second in (0, 1, 62):
        clock.tick(100.0 + second, compiling, shown.append)
    clock.tick(163.0, None, shown.append)
    clock.tick(164.0, None, shown.append)
    assert shown == ["compiling 1:02", None]
    assert len(said) == 6


def test_a_run_tells_what_takes_its_time(said):
    seen = []

    class Slow(BoringStrategy):
        def outer_update(self, state, tasks, *, key):
            seen.append(run[0].activity and run[0].activity[0] if run else None)
            return super().outer_update(state, tasks, key=key)

    run = []
    recorder = Recorder(every=10, act=lambda hook, step, r: run.append(r))
    boring_fit(10, strategy=Slow(noise=0.11), callbacks=[recorder])
    assert seen[-1] == "compiling"
    assert run[0].activity is None


# What hangs.


class Hanging:
    def __init__(self, step, forever):
        self.step, self.forever = step, forever

    def __getitem__(self, step):
        if step >= self.step:
            self.forever.wait()
        return host_batch(step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_source_that_hangs_is_not_waited_for(number, forever, tmp_path):
    press = Recorder(every=7, act=at("on_step_end", 7, lambda run: later(number)))
    callbacks = [press, Checkpoint(tmp_path, every=1000)]
    with suppress(SystemExit):
        boring_fit(40, tasks=Hanging(7, forever), callbacks=callbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000007.ckpt"]


@pytest.mark.parametrize("main, steps_per_execution", [(True, 5), (False, "auto")])
def test_max_time_does_not_wait_for_a_source(forever, main, steps_per_execution):
    # 5 does not divide 7: the last batches that are there are used.
    recorder, states = Recorder(), []

    def run():
        options = {"max_time": 0.5, "steps_per_execution": steps_per_execution}
        states.append(boring_fit(40, tasks=Hanging(7, forever), callbacks=[recorder], **options))

    if main:
        run()
    else:  # where there are no signals
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert int(states[0].step) == 7
    assert recorder.stop_reason == "time limit"
    assert recorder.metrics["step"].tolist() == list(range(1, 8))


def test_what_was_taken_is_saved_before_the_source_comes(forever, tmp_path):
    seen = []

    class Source:
        def __getitem__(self, step):
            if step == 7:
                while not (tmp_path / "step-000000006.ckpt").exists():
                    time.sleep(0.01)
                seen.append(step)
            return host_batch(step)

    checkpoint = Checkpoint(tmp_path, every=6, keep=None)
    boring_fit(12, tasks=Source(), callbacks=[checkpoint])
    assert seen == [7]


def test_the_first_batch_may_be_interrupted(forever):
    later(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        boring_fit(40, tasks=Hanging(0, forever))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("hook", ["on_chunk_end", "on_step_end", "on_fit_end"])
def test_a_hook_that_waits_for_ever_is_left(hook, number, forever, said, tmp_path):
    def wait(run):
        os.kill(os.getpid(), number)
        forever.wait()

    waiting = Recorder(every=10, act=at(hook, 10, wait))
    waiting.grace = 0.1
    other = Recorder("other", every=10)
    with suppress(SystemExit):
        boring_fit(20, callbacks=[waiting, other, Checkpoint(tmp_path, every=1000)])
    end = 20 if hook == "on_fit_end" else int(other.metrics["step"][-1])
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{end:09}.ckpt"]
    assert f"recorder.{hook} was left" in said[-1]
    assert other.steps_of("on_fit_end") == [end]


def test_a_hook_that_waits_again_on_its_way_out_is_left_as_well(forever, said):
    def wait(run):
        os.kill(os.getpid(), signal.SIGINT)
        with ThreadPoolExecutor(1) as pool:  # which waits for its thread
            pool.submit(forever.wait).result()

    waiting = Recorder(every=10, act=at("on_step_end", 10, wait))
    waiting.grace = 0.1
    assert int(boring_fit(20, callbacks=[waiting]).step) == 10
    assert "recorder.on_step_end was left" in said[-1]


@pytest.mark.parametrize("grace", [0, -1.0, "1", float("nan")])
def test_a_grace_that_is_none(grace):
    recorder = Recorder()
    recorder.grace = grace
    with pytest.raises(ValueError, match=r"callbacks\[0\].grace"):
        boring_fit(1, callbacks=[recorder])


@pytest.mark.parametrize("grace", [None, 60.0])
def test_a_hook_that_may_take_its_time_has_it(grace, said):
    def slow(run):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        done.append(1)

    done, recorder = [], Recorder(every=10, act=at("on_step_end", 10, slow))
    recorder.grace = grace
    boring_fit(20, callbacks=[recorder])
    assert done == [1] and len(said) == 1


def test_jax_is_not_broken_off_however_long_it_takes():
    # An exception in the middle of its compiler may end the process.
    def traced(x):
        time.sleep(0.8)
        done.append(1)
        return x

    def compile(run):
        os.kill(os.getpid(), signal.SIGINT)
        jax.jit(traced)(1.0)

    done, recorder = [], Recorder(every=10, act=at("on_step_end", 10, compile))
    recorder.grace = 0.1
    assert int(boring_fit(20, callbacks=[recorder]).step) == 10
    assert done == [1]


def test_a_second_ctrl_c_ends_what_waits(forever):
    def wait(run):
        os.kill(os.getpid(), signal.SIGINT)
        later(signal.SIGINT)
        forever.wait()

    with pytest.raises(KeyboardInterrupt):
        boring_fit(20, callbacks=[Recorder(every=10, act=at("on_step_end", 10, wait))])


@pytest.mark.parametrize("saved", [10, 1000])
def test_a_disk_that_does_not_answer_is_not_waited_for(saved, forever, tmp_path, monkeypatch):
    monkeypatch.setattr("eqxmeta._files.background.SECONDS", 0.2)
    fsync = os.fsync

    def stuck(run):
        monkeypatch.setattr("os.fsync", lambda descriptor: forever.wait())
        later(signal.SIGTERM)

    log = tmp_path / "log.jsonl"
    stop = Recorder(every=10, act=at("on_step_end", 10, stuck))
    callbacks = [stop, JSONL(log), Checkpoint(tmp_path / "saved", every=saved)]
    warned = pytest.warns(RuntimeWarning, match="in its place, but not synced")
    with warned, pytest.raises(SystemExit):
        boring_fit(10**9, callbacks=callbacks)
    end = stop.steps_of("on_fit_end")[0]
    path = tmp_path / "saved" / f"step-{end:09}.ckpt"
    state = boring_fit(end)
    assert same_bits(em.load(path, state), state)
    assert len(log.read_text().splitlines()) == end
    # Until the disk has answered the folder has its owner.
    again = Checkpoint(tmp_path / "saved", every=10)
    with pytest.raises(em.CheckpointInUse):
        boring_fit(end + 5, callbacks=[again], resume="auto")
    monkeypatch.setattr("os.fsync", fsync)
    forever.set()
    while (tmp_path / "saved" / ".lock").exists():
        time.sleep(0.01)
    assert int(boring_fit(end + 5, callbacks=[again], resume="auto").step) == end + 5


# What is somebody else's.


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_has_its_own_signals(said):
    # Such as a worker that reads data: whoever ends it does not mean the run.
    statuses = []

    def fork(run):
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        statuses.append(os.waitpid(child, 0)[1])

    state = boring_fit(20, callbacks=[Recorder(every=10, act=at("on_step_end", 10, fork))])
    assert os.WTERMSIG(statuses[0]) == signal.SIGTERM
    assert int(state.step) == 20
    assert said == []


def test_a_handler_of_the_users_is_called_before_the_first_step(said):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))

    class Pressed(BoringTasks):
        def sample(self, key):
            if not seen:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sample(key)

    assert int(boring_fit(20, tasks=Pressed()).step) == 20
    assert seen == [signal.SIGTERM] and said == []
    signal.signal(signal.SIGTERM, previous)


def test_a_handler_of_the_users_decides_what_an_early_signal_means(said):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    press = Recorder(act=at("on_fit_start", 0, send(signal.SIGTERM)))
    assert int(boring_fit(20, callbacks=[press]).step) == 0
    assert seen == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, previous)


def test_a_repeated_sigterm_is_not_told_again(said):
    def twice(run):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    with pytest.raises(SystemExit):
        boring_fit(20, callbacks=[Recorder(every=10, act=at("on_step_end", 10, twice))])
    assert len(said) == 1 and said[0].startswith("SIGTERM: ")


# Compiling is not counted.


def test_max_time_counts_from_the_first_step():
    class Slow(BoringStrategy):
        def outer_update(self, state, tasks, *, key):
            time.sleep(0.2)  # while it is traced
            return super().outer_update(state, tasks, key=key)

    recorder = Recorder()
    state = boring_fit(10**9, strategy=Slow(noise=0.12), callbacks=[recorder], max_time=0.1)
    assert int(state.step) > 1  # more than the one chunk that is always taken
    state = boring_fit(10**9, callbacks=[recorder], max_time=1e-9)
    assert int(state.step) >= 1
    assert recorder.stop_reason == "time limit"


# A callback that fails to begin.


def test_a_callback_that_does_not_begin_has_nothing_to_put_in_order():
    class Full(Recorder):
        def on_fit_start(self, run):
            raise OSError(28, "No space left on device")

        def on_exception(self, run, error):
            raise AttributeError("self._file")

    before, after = Recorder(), Recorder("after")
    with pytest.raises(OSError, match="No space") as caught:
        boring_fit(20, callbacks=[before, Full("full"), after])
    assert not hasattr(caught.value, "__notes__")
    assert before.errors == [caught.value] and after.events == []
