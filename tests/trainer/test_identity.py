"""Which runs a checkpoint may be resumed as: the same, whatever differs in how it is written down;
and no other, however deep the difference."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._trainer.summary import describe
from eqxmeta.callbacks import Checkpoint

from ..boring import BoringModel, BoringStrategy, BoringTasks, boring_fit, compilations, same_bits
from ..helpers import tree_allclose

ROOT = Path(__file__).parents[2]


class Ema(em.Strategy):
    """The mean over steps of what another strategy learns."""

    base: em.Strategy
    decay: float = 0.5

    @property
    def loss(self):
        return self.base.loss

    def init(self, model):
        return self.base.init(model)

    def inner_adapt(self, model, support, *, key=None):
        return self.base.inner_adapt(model, support, key=key)

    def outer_update(self, state, tasks, *, key):
        new, metrics = self.base.outer_update(state, tasks, key=key)
        mean = jax.tree.map(
            lambda a, b: self.decay * a + (1 - self.decay) * b, state.model, new.model
        )
        return em.TrainState(new.step, mean, new.opt_state), metrics


@dataclasses.dataclass(frozen=True)
class Plain:
    sizes: tuple = (1, {"deep": 2.0})


class Pair(NamedTuple):
    left: Any = 1
    right: Any = None


class Callee:
    """A function that is an object; what it counts is not what it is."""

    def __init__(self, scale):
        self.scale = scale
        self.calls = []
        self._cache = object()

    def __call__(self, x):
        self.calls.append(x)
        return x * self.scale


def scaled(scale):
    def loss(x):
        return x * scale

    return loss


def defaulted(x, scale=1.0):
    return x * scale


class Configured(BoringStrategy):
    """One field with anything in it."""

    cfg: Any = None


def strategies():
    """By name, pairs of fields of which the first makes another run than the second, and what the
    error tells of them: made anew by each call, as by another process."""
    weights = np.arange(30.0, dtype=np.float32)
    return {
        "tuple": ((1.0, 2.0), (7.0, 2.0), r"strategy\.cfg\[0\]=1\.0.*strategy\.cfg\[0\]=7\.0"),
        "dict": ({"a": {"b": 1}}, {"a": {"b": 2}}, r"cfg\['a'\]\['b'\]=1.*=2"),
        "set": ({"x", "y", "zz"}, {"x", "y"}, r"cfg=\{'x', 'y', 'zz'\}.*=\{'x', 'y'\}"),
        "dataclass": (Plain(), Plain((1, {"deep": 3.0})), r"sizes\[1\]\['deep'\]=2\.0.*=3\.0"),
        "named tuple": (Pair(), Pair(2), r"cfg\.left=1.*cfg\.left=2"),
        "type": (1, True, "cfg=1.*cfg=True"),
        "module": (BoringStrategy(noise=0.1), BoringStrategy(noise=0.2), r"cfg\.noise=0\.1.*0\.2"),
        "array": (
            np.float32([1, 2]),
            np.float32([2, 1]),
            r"32\[2\] of 1\.0, 2\.0.*of 2\.0, 1\.0",
        ),
        "order": (weights, weights[::-1], r"float32\[30\] about .* in order "),
        "integers": (np.arange(9), np.arange(9)[::-1], r"cfg=int64\[9\]"),
        "jax array": (jnp.float32(0.1), jnp.float32(0.1001), r"float32\[\] of 0\.1\n.*of 0\.1001"),
        "function": (jnp.tanh, jnp.sin, "cfg=tanh.*cfg=sin"),
        "partial": (
            functools.partial(defaulted, scale=0.5),
            functools.partial(defaulted, scale=0.7),
            r"cfg\.keywords\['scale'\]=0\.5.*=0\.7",
        ),
        "closure": (scaled(0.5), scaled(0.7), r"cfg\(scale\)=0\.5.*cfg\(scale\)=0\.7"),
        "jitted": (jax.jit(scaled(0.5)), jax.jit(scaled(0.7)), r"cfg\(scale\)=0\.5.*=0\.7"),
        "vmapped": (jax.vmap(jnp.sin, 0), jax.vmap(jnp.sin, 1), r"in_axes\)=0.*in_axes\)=1"),
        "object": (Callee(0.5), Callee(0.7), r"cfg\(scale\)=0\.5.*cfg\(scale\)=0\.7"),
        "method": (Callee(0.5).__call__, Callee(0.7).__call__, r"scale\)=0\.5.*scale\)=0\.7"),
        "lambda": (lambda m: m.bias, lambda m: m.weight, r"cfg\(code\)='bias #.*'weight #"),
        "operator": (lambda x: x + 2, lambda x: x * 2, r"cfg\(code\)='2 #.*'2 #"),
        "inner lambda": (
            lambda x: (lambda y: y + 1)(x),
            lambda x: (lambda y: y - 1)(x),
            r"cfg\(code\)=",
        ),
        "schedule": (
            optax.cosine_decay_schedule(0.1, 100),
            optax.cosine_decay_schedule(0.1, 200),
            r"decay_steps\)=100.*=200",
        ),
        "optimizer": (optax.sgd(0.1), optax.sgd(0.5), r"step_size\)=-0\.1.*=-0\.5"),
        "several optimizers": (
            optax.multi_transform({"a": optax.adam(0.1)}, lambda p: p),
            optax.multi_transform({"a": optax.adam(0.1, b1=0.5)}, lambda p: p),
            r"b1\)=0\.9.*b1\)=0\.5",
        ),
    }


NAMES = tuple(strategies())


def fit(folder, strategy, steps=2, **options):
    callbacks = [Checkpoint(folder, every=1)]
    return boring_fit(steps, strategy=strategy, callbacks=callbacks, resume="auto", **options)


class Accepted(Exception):
    """Instead of what comes after the comparison, so that nothing is traced."""


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """`resume(saved, asking)`: a checkpoint of the one strategy, resumed with the other."""

    def accept(*args):
        raise Accepted

    def resume(saved, asking):
        state = saved.init(BoringModel())
        (tmp_path / "step-000000002.ckpt").unlink(missing_ok=True)
        meta = {"step": 2, "run": "a", "config": described(saved)}
        state = em.TrainState(jnp.int32(2), state.model, state.opt_state)
        em.save(tmp_path / "step-000000002.ckpt", state, meta=meta)
        monkeypatch.setattr("eqxmeta._trainer.trainer.check_outer_update", accept)
        with pytest.raises(Accepted):
            fit(tmp_path, asking, 4)

    return resume


def described(strategy):
    return describe(
        strategy, BoringModel(), strategy.init(BoringModel()), BoringTasks(),
        steps=2, seed=0, meta_batch_size=2, saves=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_another_strategy_is_refused_at_any_depth(resume, name):
    saved, other, told = strategies()[name]
    with pytest.raises(em.CheckpointMismatch, match=f"(?s)is of another run.*{told}"):
        resume(Configured(cfg=saved), Configured(cfg=other))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_strategy_made_anew_is_the_same_run(resume, name):
    saved, again = strategies()[name][0], strategies()[name][0]
    if isinstance(again, Callee):
        again(1.0)  # what it counts is no setting of it
    resume(Configured(cfg=saved), Configured(cfg=again))


def maml(steps, cls=em.MAML, rate=0.1, outer=0.1, **options):
    inner = em.InnerLoop(optax.sgd(rate), steps, **options)
    return cls(em.losses.mse, inner, optax.sgd(outer))


def test_a_strategy_that_wraps_another(resume):
    told = r"base=MAML, strategy\.base\.inner\.steps=2.*base=FOMAML, .*inner\.steps=5"
    with pytest.raises(em.CheckpointMismatch, match=f"(?s){told}"):
        resume(Ema(maml(2)), Ema(maml(5, em.FOMAML)))
    with pytest.raises(em.CheckpointMismatch, match=r"(?s)step_size\)=-0\.1.*step_size\)=-0\.3"):
        resume(Ema(maml(2)), Ema(maml(2, rate=0.3)))
    # The outer rate may change, and how the loop is laid out in memory.
    resume(Ema(maml(2)), Ema(maml(2, outer=0.3, remat=True)))


@pytest.mark.slow
def test_every_strategy_is_known_again_in_another_process(tmp_path):
    program = """
import json, sys; sys.path.insert(0, sys.argv[1])
from tests.trainer import test_identity as t
told = {n: t.described(t.Configured(cfg=c[0])) for n, c in t.strategies().items()}
print(json.dumps(told))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(ROOT)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }
    assert len(outputs) == 1
    assert not re.search("0x[0-9a-f]{6}", outputs.pop())


def test_data_in_another_order_is_other_data(tmp_path):
    images = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)

    def tasks(images):
        return em.tasks.Episodes(images, np.repeat(np.arange(3), 4), 2, 1, 2)

    strategy = em.ProtoNet(em.losses.cross_entropy, optax.sgd(0.1))
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    fit(tmp_path, strategy, tasks=tasks(images), model=model)
    with pytest.raises(em.CheckpointMismatch, match=r"tasks\.images="):
        fit(tmp_path, strategy, 3, tasks=tasks(images[::-1]), model=model)


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("jax_enable_x64", True, "False.*True"),
        ("jax_default_matmul_precision", "highest", "None.*highest"),
        ("jax_default_prng_impl", "rbg", "threefry2x32.*rbg"),
        ("jax_threefry_partitionable", False, "True.*False"),
        ("jax_random_seed_offset", 3, "0.*3"),
    ],
)
def test_settings_of_jax_on_which_the_numbers_depend(tmp_path, setting, value, told):
    fit(tmp_path, None)
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        with pytest.raises(em.CheckpointMismatch, match=rf"(?s){setting}={told.split('.')[0]}"):
            fit(tmp_path, None, 4)
    finally:
        jax.config.update(setting, before)


# The learning rate.


def joint(optimizer):
    return em.Joint(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optimizer)


def with_plain_rates(folder, *rates):
    """A run of two steps with each of these rates, one after another."""
    for index, rate in enumerate(rates):
        state = fit(folder, joint(optax.sgd(rate)), 2 * (index + 1))
    return state


@pytest.mark.slow
def test_an_injected_rate_is_changed_as_a_plain_one_is(tmp_path):
    injected: Callable = optax.inject_hyperparams(optax.sgd)
    wanted = with_plain_rates(tmp_path / "plain", 0.1, 0.01)
    folder = tmp_path / "injected"
    fit(folder, joint(injected(0.1)), 2)
    shutil.copytree(folder, tmp_path / "same")
    told = r"hyperparams\['learning_rate'\] is 0\.1 in the file, and 0\.01 is taken"
    with pytest.warns(RuntimeWarning, match=told):
        state = fit(folder, joint(injected(0.01)), 4)
    assert tree_allclose(state.model, wanted.model, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for before is no change
        again = fit(folder, joint(injected(0.01)), 6)
        assert float(again.opt_state.hyperparams["learning_rate"]) == np.float32(0.01)
        same = fit(tmp_path / "same", joint(injected(0.1)), 4)
    unchanged = with_plain_rates(tmp_path / "unchanged", 0.1, 0.1)
    assert tree_allclose(same.model, unchanged.model, rtol=1e-6, atol=1e-7)


def test_an_injected_array_is_changed_whatever_its_size(tmp_path):
    def scaled(scales):
        scale = optax.stateless(lambda g, _: jax.tree.map(lambda x: x * scales.mean(), g))
        return optax.chain(scale, optax.sgd(0.1))

    injected: Callable = optax.inject_hyperparams(scaled)
    fit(tmp_path, joint(injected(jnp.ones(10_001))), 1)
    with pytest.warns(RuntimeWarning, match=r"hyperparams\['scales'\]"):
        state = fit(tmp_path, joint(injected(jnp.full(10_001, 0.5))), 2)
    assert np.all(state.opt_state.hyperparams["scales"] == 0.5)


def test_a_rate_that_the_run_itself_has_changed_is_no_other_wish(tmp_path):
    # As one that a schedule makes, or a strategy that lowers it.
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    straight = boring_fit(6, strategy=joint(optax.inject_hyperparams(optax.sgd)(schedule)))
    for steps in (3, 6):
        resumed = fit(tmp_path, joint(optax.inject_hyperparams(optax.sgd)(schedule)), steps)
    assert same_bits(straight, resumed)
    # Another schedule is that of the run that asks, as where it is not injected: no warning.
    schedule = optax.linear_schedule(0.2, 0.0, 10)
    resumed = fit(tmp_path, joint(optax.inject_hyperparams(optax.sgd)(schedule)), 9)
    assert np.isclose(resumed.opt_state.hyperparams["learning_rate"], schedule(8))


def test_a_sweep_with_the_rate_in_the_state_compiles_nothing_new():
    strategy = joint(optax.inject_hyperparams(optax.sgd)(0.1))
    trainer = em.Trainer(strategy, meta_batch_size=2, summary=False)
    model, tasks = BoringModel(), BoringTasks()

    def run(rate):
        state = strategy.init(model)
        where = lambda s: s.opt_state.hyperparams["learning_rate"]  # noqa: E731
        state = eqx.tree_at(where, state, jnp.asarray(rate))
        return trainer.fit(model, tasks, 3, resume=state)

    first = run(0.1)
    assert same_bits(first, trainer.fit(model, tasks, 3))
    with compilations() as compiled:
        others = {rate: run(rate) for rate in (0.01, 0.02)}
    assert compiled == []
    for rate, state in others.items():
        wanted = boring_fit(3, strategy=joint(optax.sgd(rate)))
        assert tree_allclose(state.model, wanted.model, rtol=1e-6, atol=1e-7)


def test_a_run_goes_on_from_a_state_in_memory(tmp_path):
    straight = boring_fit(7)
    callbacks = [Checkpoint(tmp_path, every=1)]
    assert same_bits(boring_fit(5, resume=boring_fit(3), callbacks=callbacks), boring_fit(5))
    assert sorted(path.name[-6] for path in tmp_path.iterdir()) == ["4", "5"]
    assert same_bits(fit(tmp_path, None, 7), straight)
    with pytest.raises(ValueError, match=r"(?s)no array \.opt_state\.bias|\.opt_state"):
        boring_fit(7, strategy=joint(optax.sgd(0.1)), resume=straight)
    with pytest.raises(ValueError, match="before the checkpoint"):
        boring_fit(5, resume=straight)


# The machine.


def test_another_number_of_cores_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    fit(tmp_path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, None, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    with pytest.warns(RuntimeWarning, match=r"cores 2, now 1.* up to rounding, and not to the bit"):
        fit(tmp_path, None, 4)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_a_process_that_may_use_one_core_is_told(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core alone")

    def run(steps, cores):
        program = f"import os; os.sched_setaffinity(0, {cores}); from tests import resume_run; "
        program += f"resume_run.main({str(tmp_path)!r}, {steps}, '--boring')"
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr

    run(20, cores[:2])
    assert "not to the bit" not in run(40, cores[:2])
    assert "cores 2, now 1. So what follows" in run(60, cores[:1])
