"""Several devices share the tasks of a step: four virtual ones, made by `conftest.py`."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._loop.chunk import Job, train_chunk
from eqxmeta._preflight.plan import _collective_bytes
from eqxmeta._task.device_source import Sampled
from eqxmeta._task.mesh import divided, mesh_of, replicated
from eqxmeta._trainer.several import Batch, train_several
from eqxmeta._trainer.start import initial_state
from eqxmeta.callbacks import Checkpoint, Evaluate

from ..boring import BoringStrategy, BoringTasks, Recorder, boring_fit, host_batch, same_bits
from ..helpers import tiny_mlp, tree_allclose

KEY = jax.random.key(0)
SINES = em.tasks.Sinusoid(4, 4)
TWO, FOUR = jax.devices()[:2], jax.devices()[:4]


def maml(gradient="mixed", outer=None, **options):
    # Not Adam, which makes whole steps of a gradient that is nothing but rounding.
    inner = em.InnerLoop(optax.sgd(0.05), 2, gradient)
    return em.MAML(em.losses.mse, inner, outer or optax.sgd(0.01), **options)


def meta_sgd():
    return em.MetaSGD(em.losses.mse, em.InnerLoop(optax.sgd(1.0), 1), optax.sgd(0.01), rate=0.05)


def reptile():
    inner = em.InnerLoop(optax.adam(0.01), 3)
    return em.Reptile(em.losses.mse, inner, optax.sgd(0.1), batch_size=3, inner_state="carry")


def anil():
    return em.ANIL(em.losses.mse, em.InnerLoop(optax.sgd(0.05), 2), optax.sgd(0.01))


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")

STRATEGIES = {"MAML": maml, "MetaSGD": meta_sgd, "Reptile": reptile, "ANIL": anil}


def fit(strategy, devices, steps=6, *, tasks=SINES, model=None, meta_batch_size=8, **options):
    resume = options.pop("resume", None)
    options = {"meta_batch_size": meta_batch_size, "summary": False, **options}
    trainer = em.Trainer(strategy, devices=devices, **options)
    return trainer.fit(tiny_mlp() if model is None else model, tasks, steps, resume=resume)


def collectives(strategy, model, tasks=SINES, meta_batch_size=8):
    """Of the training program for four devices, by the text that XLA compiled: the kinds of
    collectives, and their bytes."""
    mesh = mesh_of(FOUR, "devices")
    state = replicated(initial_state(strategy, model, "model"), mesh)
    source = replicated(Sampled(tasks, meta_batch_size), mesh)
    ends = replicated((jnp.int32(0), jnp.int32(3)), mesh)
    job = Job(strategy, source, replicated(KEY, mesh), *ends, False, mesh)
    text = train_chunk.lower(job, state).compile().as_text()
    found = COLLECTIVE.findall(text)
    arrays = [re.findall(r"f32\[([\d,]*)\]", shapes) for shapes, _ in found]
    sizes = [4 * int(np.prod([int(n) for n in s.split(",") if n])) for a in arrays for s in a]
    return [kind for _, kind in found], sum(sizes)


@pytest.mark.parametrize(
    "name", [n if n == "MAML" else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES]
)
def test_the_same_as_on_one_device_and_one_all_reduce_a_step(name):
    strategy = STRATEGIES[name]()
    one, four = Recorder(), Recorder()
    alone = fit(strategy, None, callbacks=[one])
    shared = fit(strategy, FOUR, callbacks=[four])
    assert tree_allclose(shared, alone, rtol=1e-5, atol=1e-6)
    for metric, values in one.metrics.items():
        np.testing.assert_allclose(four.metrics[metric], values, rtol=1e-4, atol=1e-6)
    leaves = jax.tree.leaves(eqx.filter(shared, eqx.is_array))
    assert {x.sharding.device_set == {jax.devices()[0]} for x in leaves} == {True}

    kinds, size = collectives(strategy, tiny_mlp())
    assert kinds == ["all-reduce"]
    state = strategy.init(tiny_mlp())
    params, _ = em.partition_learnt(strategy, state.model)
    told = params, state.opt_state.inner if name == "Reptile" else None
    gradient = sum(x.size for x in jax.tree.leaves(told) if eqx.is_inexact_array(x))
    # The rest are the metrics, of which `grad_norm` is computed from the mean.
    assert size == 4 * (gradient + len(one.metrics) - len(["step", "grad_norm"]))


def test_the_same_bits_however_the_steps_are_cut(tmp_path):
    strategy = maml(outer=optax.adam(1e-2))
    whole = fit(strategy, TWO, 7)
    assert same_bits(whole, fit(strategy, TWO, 7, steps_per_execution=2))
    fit(strategy, TWO, 3, callbacks=[Checkpoint(tmp_path, every=3)])
    again = fit(strategy, TWO, 7, callbacks=[Checkpoint(tmp_path, every=3)], resume="auto")
    assert same_bits(whole, again)


@pytest.mark.slow
def test_resumed_on_fewer_devices(tmp_path):
    strategy = maml()
    fit(strategy, FOUR, 2, callbacks=[Checkpoint(tmp_path, every=1)])
    for steps, devices, told in ((4, TWO, "devices 4, now 2"), (6, None, "devices 2, now 1")):
        with pytest.warns(RuntimeWarning, match=told):
            last = fit(
                strategy, devices, steps, callbacks=[Checkpoint(tmp_path, every=1)], resume="auto"
            )
    assert tree_allclose(last, fit(strategy, None, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk, gradient", [(1, "mixed"), (3, "reverse"), (None, "first_order")])
def test_chunks_and_modes(chunk, gradient):
    strategy = maml(gradient, task_chunk=chunk)
    assert tree_allclose(fit(strategy, TWO, 3), fit(strategy, None, 3), rtol=1e-5, atol=1e-6)


def test_the_step_is_donated():
    strategy, mesh = maml(), mesh_of(FOUR, "devices")
    state = replicated(initial_state(strategy, tiny_mlp(), "model"), mesh)
    ends = replicated((jnp.int32(0), jnp.int32(3)), mesh)
    source = replicated(Sampled(SINES, 8), mesh)
    train_chunk(Job(strategy, source, replicated(KEY, mesh), *ends, False, mesh), state)
    assert all(x.is_deleted() for x in jax.tree.leaves(eqx.filter(state, eqx.is_array)))


def test_a_source_on_the_host():
    class Batches:
        def __getitem__(self, step):
            return host_batch(step, meta_batch_size=4)

    model = eqx.nn.MLP(3, 1, 8, 1, key=KEY)
    options = {"tasks": Batches(), "model": model, "meta_batch_size": 4}
    one, two = (fit(maml(), devices, **options) for devices in (None, TWO))
    assert tree_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_images_and_a_convolution():
    images = np.random.default_rng(0).normal(size=(12, 3, 1, 16, 16)).astype("f4")
    labels = np.repeat(np.arange(12), 3)
    tasks = em.tasks.Episodes(images.reshape(36, 1, 16, 16), labels, ways=3, shots=1, queries=2)
    model = em.nn.Conv4(1, 3, width=4, size=16, key=KEY)
    inner = em.InnerLoop(optax.sgd(0.1), 1)
    strategy = em.MAML(em.losses.cross_entropy, inner, optax.sgd(0.01))
    options = {"tasks": tasks, "model": model, "meta_batch_size": 2}
    one, two = (fit(strategy, devices, 2, **options) for devices in (None, TWO))
    assert tree_allclose(one, two, rtol=1e-4, atol=1e-5)
    kinds, _ = collectives(strategy, model, tasks, 4)
    assert kinds == ["all-reduce"]


def test_evaluated_by_all_devices_with_padding():
    strategy, model = maml(), tiny_mlp()
    one = em.evaluate(strategy, model, SINES, num_tasks=7, inner_steps=3)
    four = em.evaluate(strategy, model, SINES, num_tasks=7, inner_steps=3, devices="all")
    np.testing.assert_allclose(four.values["loss"], one.values["loss"], rtol=1e-5)
    seen = Evaluate(SINES, every=2, num_tasks=7)
    state = fit(strategy, FOUR, 2, callbacks=[seen])
    expected = em.evaluate(strategy, state.model, SINES, num_tasks=7)
    np.testing.assert_allclose(seen.result.values["loss"], expected.values["loss"], rtol=1e-5)


@pytest.mark.slow
def test_several_seeds_need_no_collective():
    def runs(devices):
        trainer = em.Trainer(maml(), meta_batch_size=3, summary=False, devices=devices)
        return em.fit_seeds(trainer, tiny_mlp(), SINES, 4, seeds=5)

    one, four = runs(None), runs(FOUR)
    assert four.metrics["loss"].shape == (5, 4)
    np.testing.assert_allclose(four.metrics["loss"], one.metrics["loss"], rtol=1e-5)
    assert tree_allclose(four.states, one.states, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_seeds_of_a_source_with_arrays_and_no_collective():
    labels = np.repeat(np.arange(6), 3)
    data = np.random.default_rng(0).normal(size=(18, 3)).astype("f4")
    tasks = em.tasks.Episodes(data, labels, ways=3, shots=1, queries=2)
    strategy = em.MAML(em.losses.cross_entropy, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.01))
    model = eqx.nn.Linear(3, 3, key=KEY)

    def runs(devices):
        trainer = em.Trainer(strategy, meta_batch_size=2, summary=False, devices=devices)
        return em.fit_seeds(trainer, model, tasks, 2, seeds=2)

    assert tree_allclose(runs(TWO).states, runs(None).states, rtol=1e-5, atol=1e-6)
    mesh = mesh_of(TWO, "devices")
    source, roots = replicated(Sampled(tasks, 2), mesh), divided(jax.random.split(KEY), mesh)
    first, last = replicated((jnp.int32(0), jnp.int32(3)), mesh)
    arrays, others = eqx.partition(strategy.init(model), eqx.is_array)
    states = eqx.combine(jax.tree.map(lambda x: jnp.stack([x, x]), arrays), others)
    states = divided(states, mesh)
    batch = Batch(strategy, source, roots, first, last, mesh)
    assert not COLLECTIVE.findall(train_several.lower(batch, states).compile().as_text())


def test_a_strategy_that_averages_by_itself_is_right_and_told_of(capsys):
    alone = boring_fit(4, meta_batch_size=4)
    shared = boring_fit(4, meta_batch_size=4, devices=FOUR, summary=True)
    assert tree_allclose(shared, alone)
    told = capsys.readouterr()
    told = told.out + told.err
    assert "each of which computes every task" in told and "eqxmeta.mean_over_tasks" in told
    fit(maml(), FOUR, 1, summary=True)
    told = capsys.readouterr()
    assert "which share the tasks of a step" in told.out + told.err


@pytest.mark.parametrize("policy", ["raise", "stop", "skip"])
def test_steps_that_are_not_finite(policy):
    strategy, seen = BoringStrategy(nan_loss=3), Recorder()
    options = {"strategy": strategy, "callbacks": [seen], "on_non_finite": policy}
    if policy == "raise":
        with pytest.raises(em.NonFiniteError, match="step 3") as caught:
            boring_fit(5, devices=TWO, **options)
        assert int(caught.value.state.step) == 2
        return
    if policy == "skip":
        with pytest.warns(RuntimeWarning, match="skipped 1"):
            state = boring_fit(5, devices=TWO, **options)
    else:
        state = boring_fit(5, devices=TWO, **options)
    assert int(state.step) == (5 if policy == "skip" else 2)


def test_what_is_sent_beside_other_work_is_counted_once():
    program = """
    %a = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2]{0} %x), dimensions={0}
    %b = f32[8]{0} all-gather-done((f32[2]{0}, f32[8]{0}) %a)
    %c = bf16[3,2]{1,0} all-reduce(bf16[3,2]{1,0} %y), to_apply=%add"""
    assert _collective_bytes(program) == 8 * 4 + 6 * 2


def test_the_default_device_alone_needs_no_mesh():
    first, second, *_ = jax.devices()
    assert mesh_of([first], "devices") is None and mesh_of([second], "devices").size == 1
    with jax.default_device(second):
        assert mesh_of([second], "devices") is None and mesh_of([first], "devices").size == 1


@pytest.mark.slow
def test_plan_tells_what_a_device_sends():
    trainer = em.Trainer(maml(), meta_batch_size=8, devices=FOUR)
    _, size = collectives(maml(), tiny_mlp())
    plan = trainer.plan(tiny_mlp(), SINES)
    assert plan.rows[0].collective_bytes == size and " sent " in str(plan)
    plain = em.Trainer(maml(), meta_batch_size=8)
    assert plain.plan(tiny_mlp(), SINES, devices=FOUR).rows[0].collective_bytes == size
    assert plain.plan(tiny_mlp(), SINES).rows[0].collective_bytes == 0


@pytest.mark.parametrize(
    "devices, kind, match",
    [
        ("both", ValueError, "'all'"),
        ([], ValueError, "distinct devices"),
        (jax.devices()[:1] * 2, ValueError, "distinct devices"),
        (["cpu:0"], TypeError, "distinct devices"),
    ],
)
def test_what_is_no_set_of_devices(devices, kind, match):
    with pytest.raises(kind, match=match) as caught:
        em.Trainer(maml(), meta_batch_size=4, devices=devices)
    assert "Trainer(devices=...)" in str(caught.value)


def test_tasks_that_cannot_be_divided():
    with pytest.raises(ValueError, match="a multiple of 4, such as 4 or 8"):
        fit(maml(), FOUR, meta_batch_size=6)
    with pytest.raises(ValueError, match="such as 4"):
        fit(maml(), FOUR, meta_batch_size=2)


def test_tasks_are_those_of_one_device():
    """A task's key does not depend on the number of devices."""
    one, four = Recorder(), Recorder()
    boring_fit(3, meta_batch_size=4, callbacks=[one], tasks=BoringTasks())
    boring_fit(3, meta_batch_size=4, callbacks=[four], tasks=BoringTasks(), devices=FOUR)
    np.testing.assert_allclose(one.metrics["seen"], four.metrics["seen"], rtol=1e-6)
