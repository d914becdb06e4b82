"""NaN and infinity end a run at the step before, or are left out of it, and reach no checkpoint."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._loop.chunk import CAPACITY
from eqxmeta._loop.non_finite import MOST_SKIPS
from eqxmeta.callbacks import (
    JSONL,
    Checkpoint,
    EarlyStopping,
    Lambda,
    ProgressBar,
    TensorBoard,
)

from ..boring import (
    BoringModel,
    BoringStrategy,
    BoringTasks,
    Recorder,
    boring_fit,
    compilations,
    host_batch,
    same_bits,
)
from ..helpers import tree_allclose


def steps_in(folder):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("*.ckpt"))


def sound(step, policy="raise"):
    """The state after `step` steps of the run in which nothing is wrong."""
    return boring_fit(step, steps_per_execution=3, on_non_finite=policy)


# A chunk that begins with the bad step, and chunks that have it at their end and in the middle.
@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("step", [1, 37, 50])
def test_a_loss_that_becomes_nan(step, limit, tmp_path):
    recorder = Recorder(every=10)
    checkpoint = Checkpoint(tmp_path, every=10, keep=None)
    with pytest.raises(
        em.NonFiniteError, match=f"'loss'.* step {step}\\.\nReceived: nan"
    ) as caught:
        boring_fit(
            50,
            strategy=BoringStrategy(nan_loss=step),
            callbacks=[recorder, checkpoint],
            steps_per_execution=limit,
        )
    error = caught.value
    assert (error.step, error.name, int(error.state.step)) == (step, "loss", step - 1)
    assert recorder.errors == [error]
    assert recorder.steps_of("on_exception") == [step - 1]
    assert recorder.steps_of("on_fit_end") == []
    assert recorder.steps_of("on_step_end") == list(range(10, step, 10))
    last = [step - 1] if step > 1 and (step - 1) % 10 else []
    assert steps_in(tmp_path) == list(range(10, step, 10)) + last
    if step > 1:
        assert same_bits(error.state, sound(step - 1))
        assert same_bits(em.load(checkpoint.last_path, error.state), error.state)


@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("step", [1, 37, 50])
def test_stop_returns_the_last_good_state(step, limit, tmp_path, capsys):
    recorder = Recorder(every=10)
    state = boring_fit(
        50,
        strategy=BoringStrategy(nan_loss=step),
        callbacks=[recorder, Checkpoint(tmp_path, every=10, keep=1)],
        steps_per_execution=limit,
        on_non_finite="stop",
        summary=True,
    )
    assert int(state.step) == step - 1
    assert recorder.stop_reason == f"The metric 'loss' is not finite at step {step}"
    assert f"stopped at step {step - 1} of 50: The metric 'loss'" in capsys.readouterr().out
    assert (recorder.errors, recorder.steps_of("on_fit_end")) == ([], [step - 1])
    assert recorder.steps_of("on_step_end") == list(range(10, step, 10))
    if step > 1:
        assert same_bits(state, sound(step - 1))
        assert recorder.metrics["step"].tolist() == list(range(1, step))
        assert steps_in(tmp_path) == [step - 1]


def test_a_run_goes_on_from_the_last_good_state(tmp_path):
    saved = Checkpoint(tmp_path, every=10)
    options = {"strategy": BoringStrategy(nan_loss=37), "callbacks": [saved]}
    with pytest.raises(em.NonFiniteError):
        boring_fit(50, **options)
    with pytest.raises(em.NonFiniteError) as caught:
        boring_fit(50, resume="auto", **options)  # nothing has changed
    assert (caught.value.step, steps_in(tmp_path)[-1]) == (37, 36)
    with pytest.warns(RuntimeWarning, match="skipped 1 steps"):
        state = boring_fit(50, resume="auto", on_non_finite="skip", **options)
    strategy = BoringStrategy(nan_loss=37)
    with pytest.warns(RuntimeWarning, match="skipped 1 steps"):
        uninterrupted = boring_fit(50, strategy=strategy, on_non_finite="skip")
    assert tree_allclose(state, uninterrupted, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("kind", ["nan_loss", "inf_model", "nan_optimizer"])
def test_skip_leaves_the_step_out(kind, limit, tmp_path, capsys):
    strategy = BoringStrategy(**{kind: 8})
    log, counts = JSONL(tmp_path / "log.jsonl"), []
    saved = Checkpoint(tmp_path, every=8, monitor="loss")
    recorder = Recorder(every=4, act=lambda hook, step, run: counts.append(run.skipped))
    state = boring_fit(
        13,
        strategy=strategy,
        callbacks=[recorder, log, saved],
        steps_per_execution=limit,
        on_non_finite="skip",
        summary=True,
    )
    # By hand from the step before, which only the counter of steps remembers.
    by_hand = sound(7, "skip")
    by_hand = em.TrainState(jnp.int32(8), by_hand.model, by_hand.opt_state)
    at_8 = em.load(tmp_path / "step-000000008.ckpt", by_hand)
    assert same_bits(at_8, by_hand)
    for step in range(8, 13):
        key = jax.random.fold_in(jax.random.key(0), step)
        tasks = jax.vmap(BoringTasks().sample)(jax.random.split(key, 2))
        by_hand, _ = strategy.outer_update(by_hand, tasks, key=jax.random.fold_in(key, 0x75706474))
    assert int(state.step) == 13
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert recorder.metrics["skipped"].tolist() == [0] * 7 + [1] + [0] * 5
    assert counts[-1] == 1
    assert np.isnan(recorder.metrics["loss"][7]) == (kind == "nan_loss")
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["skipped"] for row in rows] == recorder.metrics["skipped"].tolist()
    assert "skipped 1 steps" in capsys.readouterr().out
    # With no value to judge it by, the state at the skipped step is not the best one.
    if kind == "nan_loss":
        assert saved.best_path == tmp_path / "step-000000013.ckpt"


def test_skip_changes_nothing_in_a_run_in_which_all_is_well():
    with compilations() as compiled:
        states = [
            boring_fit(20, on_non_finite="skip", steps_per_execution=limit) for limit in (20, 7)
        ]
    assert len(compiled) <= 1  # one program for every length, with this policy too
    assert same_bits(*states)
    # Another program than without the policy: its last bits are the compiler's.
    assert tree_allclose(states[0], sound(20), rtol=1e-5)


class Hopeless(BoringStrategy):
    """Every step is bad from step `begin` on, but for each `good`-th."""

    begin: np.int32 = eqx.field(default=5, converter=np.int32)
    good: np.int32 = eqx.field(default=10**6, converter=np.int32)

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
        bad = (new.step >= self.begin) & (new.step % self.good != 0)
        return new, {**metrics, "loss": jnp.where(bad, jnp.inf, metrics["loss"])}


@pytest.mark.parametrize("limit", [1, 64, CAPACITY])
def test_too_many_skips_in_a_row_are_an_error(limit, tmp_path):
    recorder = Recorder()
    with pytest.raises(em.NonFiniteError) as caught:
        boring_fit(
            300,
            strategy=Hopeless(begin=5),
            callbacks=[recorder, Checkpoint(tmp_path, every=1000)],
            steps_per_execution=limit,
            on_non_finite="skip",
        )
    error, last = caught.value, 4 + MOST_SKIPS
    assert f"{MOST_SKIPS} outer steps in a row were skipped" in str(error)
    assert f"Received: 'loss' = inf at step {last}" in str(error)
    assert (error.step, error.name, int(error.state.step)) == (last, "loss", last)
    assert same_bits(error.state.model, sound(4, "skip").model)
    assert recorder.metrics["step"][-1] == last
    assert steps_in(tmp_path) == [last]


def test_skips_are_counted_over_a_resume(tmp_path):
    def go_on(steps):
        callbacks = [Checkpoint(tmp_path, every=1000)]
        strategy = Hopeless(begin=5)
        boring_fit(
            steps, strategy=strategy, callbacks=callbacks, on_non_finite="skip", resume="auto"
        )

    for stop, skipped in ((50, 46), (60, 56)):
        with pytest.warns(RuntimeWarning, match=f"skipped {skipped} steps"):
            go_on(stop)
    with pytest.raises(em.NonFiniteError) as caught:
        go_on(300)
    assert caught.value.step == 4 + MOST_SKIPS


def test_skips_now_and_then_are_none():
    recorder = Recorder(act=lambda hook, step, run: counts.append(run.skipped))
    counts = []
    strategy = Hopeless(begin=1, good=MOST_SKIPS)
    with pytest.warns(RuntimeWarning, match="skipped 347 steps"):
        state = boring_fit(350, strategy=strategy, callbacks=[recorder], on_non_finite="skip")
    assert int(state.step) == 350
    assert counts[-1] == 347


def test_the_steps_before_the_nan_are_logged(tmp_path):
    # A loss curve that ends a chunk before the trouble does not show it.
    recorder, log = Recorder(), JSONL(tmp_path / "log.jsonl")
    with pytest.raises(em.NonFiniteError):
        boring_fit(
            50,
            strategy=BoringStrategy(nan_loss=37),
            callbacks=[recorder, log],
            steps_per_execution=64,
        )
    assert recorder.metrics["step"].tolist() == list(range(1, 37))
    assert len(log.path.read_text().splitlines()) == 36


def test_hooks_see_the_last_good_state():
    seen = []

    def look(run, *_):
        seen.append((run.step, run.state))

    with pytest.raises(em.NonFiniteError):
        boring_fit(
            50,
            strategy=BoringStrategy(nan_loss=37),
            callbacks=[Lambda(on_exception=look, on_chunk_end=look)],
            steps_per_execution=64,
        )
    assert [step for step, _ in seen][-2:] == [36, 36]
    assert same_bits(seen[-1][1], sound(36)) and same_bits(seen[-2][1], sound(36))


@pytest.mark.parametrize("kind", ["inf_model", "nan_optimizer"])
@pytest.mark.parametrize("limit", [20, 50])
def test_a_state_that_becomes_infinite(kind, limit, tmp_path):
    # At the last step of a chunk no metric could tell, and within one the next step's would.
    name = {"inf_model": "model.bias", "nan_optimizer": "opt_state.bias"}[kind]
    recorder = Recorder(every=limit)
    with pytest.raises(em.NonFiniteError, match=rf"`{name}`.* step 20") as caught:
        boring_fit(
            50,
            strategy=BoringStrategy(**{kind: 20}),
            callbacks=[recorder, Checkpoint(tmp_path, every=limit)],
            steps_per_execution=50,
        )
    error = caught.value
    assert (error.step, error.name, int(error.state.step)) == (20, name, 19)
    assert same_bits(error.state, sound(19))
    assert recorder.metrics["step"].tolist() == list(range(1, 20))
    assert recorder.steps_of("on_step_end") == []
    assert steps_in(tmp_path) == [19]


class NaNFrom(dict):
    """Host batches of which that of index `bad` has one NaN among the queries."""

    def __init__(self, bad):
        super().__init__({step: host_batch(step) for step in range(80)})
        self[bad].query[0][1, 2, 0] = np.nan


@pytest.mark.parametrize("policy", ["raise", "stop", "skip"])
def test_data_that_is_not_finite(policy):
    # Read by the host, so that the batches of a chunk are needed once more.
    inner = em.InnerLoop(optax.sgd(0.01), steps=2)
    strategy = em.MAML(em.losses.mse, inner, optax.adam(1e-3))
    options = {"strategy": strategy, "steps_per_execution": 25}
    tasks = NaNFrom(56)
    if policy == "skip":
        recorder = Recorder()
        with pytest.warns(RuntimeWarning, match="skipped 1 steps"):
            boring_fit(80, tasks=tasks, callbacks=[recorder], on_non_finite=policy, **options)
        assert np.flatnonzero(recorder.metrics["skipped"]).tolist() == [56]
        return
    if policy == "stop":
        state = boring_fit(80, tasks=tasks, on_non_finite=policy, **options)
    else:
        with pytest.raises(em.NonFiniteError, match=r"step 57\.\n.*`tasks.query\[0\]`") as caught:
            boring_fit(80, tasks=tasks, **options)
        # A smaller learning rate would help nothing.
        assert str(caught.value).endswith("So must the data be, before anything else helps")
        assert caught.value.step == 57
        state = caught.value.state
    assert same_bits(state, boring_fit(56, tasks=tasks, **options))


class WrongLabels(eqx.Module):
    """Queries of four classes, for a model with three outputs."""

    def sample(self, key):
        x, y = jax.random.normal(key, (4, 3)), jnp.arange(4)
        return em.Task((x, y % 3), (x, y))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_labels_out_of_range_are_told_of(policy):
    inner = em.InnerLoop(optax.sgd(0.01), steps=1)
    strategy = em.MAML(em.losses.cross_entropy, inner, optax.adam(1e-3))
    model = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    with pytest.raises(em.NonFiniteError, match=r"labels must be in range\(classes\).* 0 to 3"):
        boring_fit(200, strategy=strategy, model=model, tasks=WrongLabels(), on_non_finite=policy)


class Masked(BoringModel):
    mask: jax.Array

    def __init__(self):
        super().__init__()
        self.mask = jnp.array([0.0, -jnp.inf])

    def __call__(self, x):
        return BoringModel.__call__(self, x) + jnp.where(self.mask == 0, 0.0, 1.0)[:1]


def _fit_masked(steps, optimizer, policy):
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optimizer)
    return boring_fit(steps, strategy=strategy, model=Masked(), on_non_finite=policy)


def test_a_mask_of_minus_infinity_is_meant_to_be_so():
    for policy in ("raise", "skip"):
        state = _fit_masked(5, optax.sgd(1e-3), policy)
        assert np.asarray(state.model.mask).tolist() == [0.0, -np.inf]
        assert np.abs(state.model.weight).max() > 0


@pytest.mark.parametrize("policy", ["raise", "stop", "skip"])
def test_a_mask_that_becomes_nan_is_told_of(policy):
    # One number that is not finite before and after: -inf, and then the weight decay's -inf + inf.
    if policy == "stop":
        state = _fit_masked(3, optax.adamw(1e-3), policy)
    else:
        with pytest.raises(em.NonFiniteError) as caught:
            _fit_masked(101 if policy == "skip" else 3, optax.adamw(1e-3), policy)
        state = caught.value.state
    assert np.asarray(state.model.mask).tolist() == [0.0, -np.inf]


class HalfMasked(BoringModel):
    mask: jax.Array

    def __init__(self):
        super().__init__()
        self.mask = jnp.array([-jnp.inf, 0.0])


class SpoilsMask(BoringStrategy):
    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
        nan = jnp.where(new.step == 5, jnp.nan, state.model.mask[1])
        return eqx.tree_at(lambda s: s.model.mask, new, new.model.mask.at[1].set(nan)), metrics


def test_a_number_beside_one_that_is_meant_to_be_infinite(tmp_path):
    callbacks = [Checkpoint(tmp_path, every=8)]
    with pytest.raises(em.NonFiniteError, match="mask") as error:
        boring_fit(8, strategy=SpoilsMask(), model=HalfMasked(), callbacks=callbacks)
    assert error.value.step == 5
    (path,) = tmp_path.glob("*.ckpt")
    assert em.load(path, error.value.state).model.mask.tolist() == [-np.inf, 0.0]


def test_no_checkpoint_holds_an_optimizer_that_is_not_finite(tmp_path):
    # The model is still finite at step 20: resuming from there could never succeed.
    with pytest.raises(em.NonFiniteError):
        boring_fit(
            50,
            strategy=BoringStrategy(nan_optimizer=20),
            callbacks=[Checkpoint(tmp_path, every=10)],
        )
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["step-000000010.ckpt", "step-000000019.ckpt"]
    for path in paths:
        state = em.load(path, boring_fit(1))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state)), path.name


def test_the_first_bad_step_is_named_whichever_metric_it_is():
    class Two(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            early = jnp.where(new.step >= 5, -jnp.inf, 0.0)
            late = jnp.where(new.step >= 6, jnp.nan, 0.0)
            return new, {"a_late": late, "z_early": early, "flag": late > 0, **metrics}

    with pytest.raises(em.NonFiniteError, match="Received: -inf") as caught:
        boring_fit(50, strategy=Two(), steps_per_execution=50)
    assert (caught.value.step, caught.value.name) == (5, "z_early")


def test_half_precision_metrics_and_all_callbacks(tmp_path):
    class Half(BoringStrategy):
        @eqx.filter_jit
        def outer_update(self, state, tasks, *, key):
            new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
            return new, {
                **metrics,
                "loss": metrics["loss"].astype(jnp.bfloat16),
                "better": metrics["loss"] < 1,
            }

    callbacks = [
        ProgressBar(),
        TensorBoard(tmp_path / "board"),
        JSONL(tmp_path / "log.jsonl"),
        EarlyStopping("loss", patience=100, every=5),
        Checkpoint(tmp_path / "saved", every=10, monitor="loss"),
    ]
    assert int(boring_fit(20, strategy=Half(), callbacks=callbacks).step) == 20
    with pytest.raises(em.NonFiniteError):
        boring_fit(20, strategy=Half(nan_loss=12))
