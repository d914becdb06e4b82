"""Tasks from the host: read by step, on a thread, ahead of the device."""

import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..boring import (
    BoringModel,
    BoringStrategy,
    Recorder,
    boring_fit,
    compilations,
    host_batch,
    same_bits,
)
from ..helpers import tree_allclose

THREAD = "eqxmeta-host-source"


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert reading_threads() == []


class Source:
    """Indexable and nothing else; notes who read what. `spoil(step)`, if given, comes first."""

    def __init__(self, spoil=None, batch=host_batch):
        self.reads = []
        self.threads = set()
        self._spoil = spoil
        self._batch = batch

    def __getitem__(self, step):
        self.reads.append(step)
        self.threads.add(threading.current_thread().name)
        result = None if self._spoil is None else self._spoil(step)
        return self._batch(step) if result is None else result


def batches(steps):
    return [host_batch(step) for step in range(steps)]


def at_step(wrong, action):
    return lambda step: action() if step == wrong else None


def raising(error):
    def action():
        raise error

    return action


def test_a_source_is_anything_indexable_by_step():
    class Sized(Source):
        def __len__(self):
            return 30

    by_list = boring_fit(30, tasks=batches(30))
    for tasks in (tuple(batches(40)), dict(enumerate(batches(30))), Source(), Sized()):
        assert same_bits(by_list, boring_fit(30, tasks=tasks))


def test_the_result_is_that_of_the_same_tasks_fed_by_hand():
    # Step `i` of the run, which hooks call `i + 1`, is given `tasks[i]`, and no other keys.
    strategy = BoringStrategy(noise=0.0)
    recorder = Recorder()
    fitted = boring_fit(100, strategy=strategy, tasks=batches(100), callbacks=[recorder])
    state = strategy.init(BoringModel())
    for step in range(100):
        tasks = jax.tree.map(jnp.asarray, host_batch(step))
        state, metrics = strategy.outer_update(state, tasks, key=None)
        np.testing.assert_allclose(recorder.metrics["loss"][step], metrics["loss"], rtol=1e-4)
    assert tree_allclose(fitted, state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, "auto"])
def test_the_result_does_not_depend_on_the_cut(limit):
    # 150 steps: more than one padded transfer of 64, and not a multiple of it.
    recorder = Recorder(every=11)
    with compilations() as compiled:
        state = boring_fit(150, tasks=Source(), callbacks=[recorder], steps_per_execution=limit)
    assert len(compiled) <= 1
    assert recorder.metrics["index"].tolist() == list(range(150))
    assert same_bits(state, boring_fit(150, tasks=Source()))


def test_large_batches_travel_in_smaller_numbers():
    # Ten steps of this exceed what may be on its way at once.
    def large(step):
        x = np.full((2, 2**20, 3), step, np.float32)
        return em.Task((x[:, :4], x[:, :4, :1]), (x, x[..., :1]))

    recorder = Recorder()
    boring_fit(5, tasks=Source(batch=large), callbacks=[recorder], steps_per_execution=64)
    assert recorder.steps_of("on_chunk_end") == [1, 2, 3, 4, 5]
    assert recorder.metrics["seen"].tolist() == [0, 1, 2, 3, 4]


def test_the_source_is_read_once_a_step_in_order_on_one_thread():
    source = Source()
    boring_fit(200, tasks=source)
    assert source.reads == list(range(200))
    # The first batch is needed for its shapes before there is anything to do meanwhile.
    assert source.threads <= {THREAD, threading.current_thread().name}
    assert THREAD in source.threads


def test_the_source_is_read_while_the_host_is_busy_but_not_without_end():
    source = Source()
    ahead = []

    def wait(hook, step, run):
        if hook != "on_step_end":
            return
        deadline, before = time.monotonic() + 10, -1
        while len(source.reads) != before and time.monotonic() < deadline:
            before = len(source.reads)
            time.sleep(0.2)
        ahead.append(len(source.reads) - step)

    boring_fit(2000, tasks=source, callbacks=[Recorder(every=1000, act=wait)])
    assert ahead[0] >= 64  # enough for a whole dispatch
    assert ahead[0] <= 4 * 64 + 1  # one dispatch in flight, two in the queue
    assert ahead[1] == 0  # and nothing beyond the last step


def test_double_precision_is_narrowed_as_jax_does():
    # What NumPy makes by default, unless told otherwise.
    def wide(step):
        return jax.tree.map(lambda x: x.astype(np.float64), host_batch(step))

    assert wide(0).support[0].dtype == np.float64
    state = boring_fit(20, tasks=Source(batch=wide))
    assert same_bits(state, boring_fit(20, tasks=Source()))


def test_jax_arrays_and_integers_are_welcome():
    class Labels(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            x, y = tasks.query
            assert y.dtype == jnp.int32
            tasks = em.Task(tasks.support, (x, y.astype(jnp.float32)))
            return BoringStrategy.outer_update(self, state, tasks, key=key)

        def loss(self, model, batch, key):
            x, y = batch
            return em.losses.mse(model, (x, y.astype(jnp.float32)), key)

    def labelled(step):
        task = host_batch(step)
        return em.Task(task.support, (jnp.asarray(task.query[0]), np.arange(8).reshape(2, 4, 1)))

    recorder = Recorder()
    boring_fit(5, strategy=Labels(), tasks=Source(batch=labelled), callbacks=[recorder])
    assert recorder.metrics["seen"].tolist() == [3.5] * 5


# Resuming.


def test_a_resumed_run_reads_from_its_first_step_on(tmp_path):
    def fit(steps, tasks, folder, **options):
        callbacks = [Checkpoint(folder, every=50)]
        return boring_fit(steps, tasks=tasks, callbacks=callbacks, **options)

    fit(100, Source(), tmp_path / "a")
    source = Source()
    state = fit(200, source, tmp_path / "a", resume="auto")
    assert source.reads == list(range(100, 200))
    assert same_bits(state, fit(200, Source(), tmp_path / "b"))


def test_a_run_that_is_over_can_be_resumed(tmp_path):
    callbacks = [Checkpoint(tmp_path, every=50)]
    first = boring_fit(100, tasks=batches(100), callbacks=callbacks)
    again = boring_fit(100, tasks=batches(100), callbacks=callbacks, resume="auto")
    assert same_bits(first, again)


# Errors.


def fails(tasks, steps=100, **options):
    """`(error, recorder)` of a run that must fail with a `ValueError` or `TypeError`."""
    recorder = Recorder()
    with pytest.raises((ValueError, TypeError)) as caught:
        boring_fit(steps, tasks=tasks, callbacks=[recorder], **options)
    message = str(caught.value)
    assert "\nReceived: " in message
    assert "\nExpected: " in message
    return message, recorder


@pytest.mark.parametrize("size", [1, 3])
def test_a_wrong_number_of_tasks(size):
    source = Source(batch=lambda step: host_batch(step, meta_batch_size=size))
    with compilations() as compiled:
        message, recorder = fails(source)
    assert message.startswith("`tasks[0]`")
    assert f"Received: {size}\n" in message
    assert "meta_batch_size=2" in message
    assert recorder.events == []
    assert compiled == []


def test_a_list_that_is_too_short():
    with compilations() as compiled:
        message, recorder = fails(batches(99))
    assert "99 batches" in message
    assert recorder.events == []
    assert compiled == []


def test_a_source_that_ends_too_early():
    end = at_step(57, raising(IndexError("no more")))
    message, recorder = fails(Source(spoil=end))
    assert message.startswith("`tasks[57]`")
    (error,) = recorder.errors
    assert isinstance(error.__cause__, IndexError)


@pytest.mark.parametrize(
    "batch",
    [
        host_batch(57, meta_batch_size=3),
        host_batch(57, dtype=np.float16),
        em.Task(host_batch(57).support, host_batch(57).support[:1]),
        em.Task(host_batch(57).support, jax.tree.map(lambda x: x[:, :2], host_batch(57).query)),
        host_batch(57).support,
        None.__class__,
        em.Task(([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0])),
    ],
    ids=["tasks", "dtype", "structure", "examples", "not a task", "a class", "lists"],
)
def test_a_batch_that_differs_from_the_first_is_named(batch):
    message, recorder = fails(Source(spoil=at_step(57, lambda: batch)))
    assert message.startswith("`tasks[57]")
    assert len(recorder.errors) == 1


def test_what_is_wrong_with_the_first_batch_is_told_before_anything_is_compiled():
    for batch in (3, host_batch(0).support, em.Task((), ())):
        with compilations() as compiled:
            message, recorder = fails(Source(spoil=lambda step, batch=batch: batch))
        assert message.startswith("`tasks[0]`")
        assert recorder.events == []
        assert compiled == []


@pytest.mark.parametrize("step", [0, 57])
@pytest.mark.parametrize("error", [RuntimeError("disk gone"), OSError("odd"), SystemExit("odder")])
def test_an_error_in_the_source_reaches_the_user(step, error):
    recorder = Recorder()
    with pytest.raises(type(error), match=error.args[0]) as caught:
        boring_fit(100, tasks=Source(spoil=at_step(step, raising(error))), callbacks=[recorder])
    assert caught.value is error
    assert recorder.errors == ([error] if step else [])


@pytest.mark.parametrize("step", [0, 57])
def test_an_iterator_that_ends_inside_the_source_is_told_as_such(step):
    # `return next(self.iterator)`: `StopIteration` must not be lost among our own generators.
    spoil = at_step(step, raising(StopIteration("odd")))
    with pytest.raises((StopIteration, ValueError)):
        boring_fit(100, tasks=Source(spoil=spoil))


def test_the_steps_before_the_error_are_told():
    spoil = at_step(57, raising(RuntimeError("disk gone")))
    recorder = Recorder()
    with pytest.raises(RuntimeError):
        boring_fit(100, tasks=Source(spoil=spoil), callbacks=[recorder], steps_per_execution=1)
    # All were taken: the device had nothing else to wait for.
    assert recorder.metrics["step"].tolist() == list(range(1, 58))


def test_an_error_far_ahead_does_not_come_early():
    # A run that ends before it needs the batch does not fail over it.
    spoil = at_step(60, raising(RuntimeError("disk gone")))

    def stop(hook, step, run):
        if hook == "on_step_end":
            run.request_stop("enough")

    recorder = Recorder(every=50, act=stop)
    state = boring_fit(100, tasks=Source(spoil=spoil), callbacks=[recorder])
    assert int(state.step) == 50


def test_the_thread_ends_with_a_run_that_fails_or_stops():
    def fail(hook, step, run):
        if hook == "on_step_end":
            assert len(reading_threads()) == 1
            raise RuntimeError("in a hook")

    def stop(hook, step, run):
        if hook == "on_step_end":
            run.request_stop("enough")

    def interrupted(hook, step, run):
        if hook == "on_step_end":
            raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="in a hook"):
        boring_fit(10_000, tasks=Source(), callbacks=[Recorder(every=10, act=fail)])
    assert reading_threads() == []
    for act in (stop, interrupted):
        state = boring_fit(10_000, tasks=Source(), callbacks=[Recorder(every=10, act=act)])
        assert int(state.step) == 10
        assert reading_threads() == []


def test_no_thread_is_left_by_a_strategy_that_is_refused():
    class Broken(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            return state

    with pytest.raises(TypeError, match="outer_update"):
        boring_fit(10_000, strategy=Broken(), tasks=Source())


def test_fast_dev_run_reads_only_what_it_needs():
    source = Source()
    boring_fit(10_000, tasks=source, fast_dev_run=4)
    assert source.reads == [0, 1, 2, 3]
    # Nor does it ask for more than it needs.
    assert int(boring_fit(10_000, tasks=batches(3), fast_dev_run=True).step) == 3


def test_a_source_may_refill_one_buffer():
    class Refilling(Source):
        def __getitem__(self, step):
            batch = super().__getitem__(step)
            if not hasattr(self, "buffer"):
                self.buffer = batch
            jax.tree.map(lambda into, values: np.copyto(into, values), self.buffer, batch)
            return self.buffer

    expected = boring_fit(20, tasks=Source(), steps_per_execution=7)
    assert same_bits(boring_fit(20, tasks=Refilling(), steps_per_execution=7), expected)
