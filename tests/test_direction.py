"""Which way a metric improves: known, declared by a loss, or asked for before the run."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta._checkpoint.fingerprint import fingerprint
from eqxmeta._direction import declared_by, direction, metric_of
from eqxmeta._preflight.outer_update import check_outer_update
from eqxmeta._strategy.metrics import SKIPPED
from eqxmeta.callbacks import Callback, Checkpoint, EarlyStopping, Evaluate

from .boring import BoringModel, BoringStrategy, BoringTasks, boring_fit, same_bits
from .fake_run import fake_run
from .helpers import tiny_mlp

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("eval/loss", "min"), ("val/loss/after_10", "min"), ("loss_before", "min"),
        ("pooled_loss", "min"), ("support_loss/0", "min"), ("support_loss/12", "min"),
        ("objective", "min"), ("accuracy", "max"), ("accuracy_before", "max"),
        ("val/accuracy", "max"), ("eval/accuracy/after_1", "max"), ("a/b/accuracy", "max"),
        # The prefix says nothing, and a part of a name is not the name.
        ("accuracy/loss", "min"), ("loss/accuracy", "max"), ("loss/index", None),
        ("inaccuracy", None), ("neg_loss", None), ("accuracy_std", None), ("eval/accuracy/x", None),
        ("grad_norm", None), ("skipped", None), ("eval/transductive", None), ("f1", None),
    ],
)  # fmt: skip
def test_the_last_part_of_a_name_decides(name, mode):
    assert direction(name, {}) == mode


def f1(model, batch, key, scale=1.0):
    loss, metrics = em.losses.mse(model, batch, key)
    return loss, {"f1": jnp.exp(-scale * loss), **metrics}


def test_every_name_that_the_library_logs_is_known_or_asked_for():
    def loss(model, batch, key):
        loss, metrics = f1(model, batch, key)
        return loss, {"accuracy": metrics["f1"]}

    inner, adam, tasks = em.InnerLoop(optax.sgd(0.1), 2), optax.adam(1e-3), BoringTasks()
    names = {SKIPPED}
    batch = jax.tree.map(lambda x: x[None], tasks.sample(jax.random.key(0)))
    for kind in (em.MAML, em.Reptile, em.Joint):
        strategy = kind(loss, inner, adam)
        state = strategy.init(BoringModel())
        names |= check_outer_update(strategy, state, batch)[0]
    evaluate = Evaluate(tasks, every=1, num_tasks=2, prefix="val")
    evaluate.refuse(fake_run(strategy=strategy, state=state))
    names |= set(evaluate.logs)
    modes = {mode: {n for n in names if direction(n, {}) == mode} for mode in ("min", "max", None)}
    assert modes["max"] == {"accuracy", "accuracy_before", "val/accuracy"}
    assert modes[None] == {"grad_norm", "skipped"}
    assert modes["min"] >= {"loss", "loss_before", "pooled_loss", "support_loss/1", "val/loss"}
    assert {metric_of(name) for name in modes["min"]} == {
        *("loss", "objective", "pooled_loss", "support_loss")
    }


class Holder(em.Strategy):
    """A strategy that wraps another, with a loss in a static field besides."""

    base: em.Strategy
    other: object = eqx.field(static=True, default=None)

    init = inner_adapt = outer_update = None

    @property
    def loss(self):
        return self.base.loss


def directed_in(loss):
    return em.MAML(loss, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.1))


DIRECTED = em.losses.directed(f1, f1="max")


@pytest.mark.parametrize(
    "strategy",
    [
        directed_in(DIRECTED),
        directed_in(functools.partial(DIRECTED, scale=2.0)),
        directed_in(eqx.Partial(DIRECTED, scale=2.0)),
        directed_in(em.losses.directed(functools.partial(f1, scale=2.0), f1="max")),
        directed_in(jax.jit(DIRECTED)),
        directed_in(eqx.filter_jit(DIRECTED)),
        directed_in(em.losses.directed(DIRECTED, other="min")),
        Holder(directed_in(DIRECTED)),
        Holder(BoringStrategy(), DIRECTED),
    ],
)
def test_a_declaration_is_found_wherever_the_loss_is(strategy):
    assert direction("eval/f1/after_3", declared_by(strategy)) == "max"
    assert direction("f1_before", declared_by(strategy)) == "max"


def test_what_is_declared_last_counts():
    loss = em.losses.directed(em.losses.directed(f1, f1="max", a="min"), f1="min", accuracy="min")
    assert declared_by(directed_in(loss)) == {"f1": "min", "a": "min", "accuracy": "min"}
    assert direction("accuracy", declared_by(directed_in(loss))) == "min"


def test_a_declaration_changes_no_number():
    batch = jax.tree.map(lambda x: x[None], BoringTasks().sample(jax.random.key(0)))

    def step(loss):
        strategy = em.MAML(loss, em.InnerLoop(optax.sgd(0.01), 2), optax.adam(1e-2))
        return strategy.outer_update(strategy.init(BoringModel()), batch, key=None)

    assert same_bits(step(f1), step(DIRECTED))


def test_a_declaration_is_no_part_of_what_a_run_is():
    plain, partial = functools.partial(f1, scale=2.0), functools.partial(DIRECTED, scale=2.0)
    for one, other in (
        (f1, DIRECTED),
        (plain, partial),
        (plain, em.losses.directed(plain, a="max")),
    ):
        facts = [fingerprint(directed_in(loss), values=True) for loss in (one, other)]
        assert facts[0] == facts[1]


def test_support_statistics_are_found_through_a_declaration():
    class Model(eqx.Module):
        norm: em.nn.SupportNorm
        out: eqx.nn.Linear

        def __call__(self, x):
            return self.out(self.norm(x))

    model = Model(em.nn.SupportNorm(3), eqx.nn.Linear(3, 1, key=jax.random.key(0)))
    support = BoringTasks().sample(jax.random.key(1)).support
    adapted = [directed_in(loss).inner_adapt(model, support) for loss in (f1, DIRECTED)]
    assert adapted[0].norm.statistics is not None
    assert same_bits(*adapted)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: em.losses.directed(f1), "such as `f1='max'`"),
        (lambda: em.losses.directed(f1, f1="maximum"), "'min' or 'max'"),
        (lambda: em.losses.directed(f1, loss="max"), "'min'"),
        (lambda: em.losses.directed(f1, **{"val/f1": "max"}), "'f1', which stands for it"),
        (lambda: em.losses.directed(f1, f1_before="max"), "'f1', which stands for it"),
        (lambda: em.losses.directed("f1", f1="max"), r"loss\(model, batch, key\)"),
    ],
)
def test_wrong_declarations(wrong, told):
    with pytest.raises((TypeError, ValueError), match=f"(?s)Received.*Expected.*{told}"):
        wrong()


class Rising(BoringStrategy):
    """A loss that reports an accuracy which grows from step to step."""

    def outer_update(self, state, tasks, *, key):
        state, metrics = super().outer_update(state, tasks, key=key)
        return state, metrics | {"accuracy": state.step / 10, "f1": state.step / 10}


class RisingAndDeclared(Rising):
    other: em.Loss = DIRECTED


@pytest.mark.parametrize(
    ("strategy", "monitor"), [(Rising(), "accuracy"), (RisingAndDeclared(), "f1")]
)
def test_the_best_and_the_stop_go_the_metrics_own_way(tmp_path, strategy, monitor):
    checkpoint = Checkpoint(tmp_path, every=1, keep=1, monitor=monitor)
    stopping = EarlyStopping(monitor, patience=2, every=1)
    state = boring_fit(5, strategy=strategy, callbacks=[checkpoint, stopping])
    assert int(state.step) == 5
    assert checkpoint.best_path == tmp_path / "step-000000005.ckpt"
    assert int(em.load_best(tmp_path, strategy, BoringModel()).step) == 5
    assert checkpoint.state_dict()["mode"] == "max"


def test_an_explicit_mode_wins(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=1, keep=1, monitor="accuracy", mode="min")
    stopping = EarlyStopping("accuracy", patience=2, every=1, mode="min")
    state = boring_fit(5, strategy=Rising(), callbacks=[checkpoint, stopping])
    assert int(state.step) == 3  # "best" at the first, then two observations without a better one
    assert checkpoint.best_path == tmp_path / "step-000000001.ckpt"
    assert int(em.load_best(tmp_path, Rising(), BoringModel()).step) == 1


@pytest.mark.parametrize("trial", [False, True])
@pytest.mark.parametrize("what", ["Checkpoint", "EarlyStopping"])
def test_where_nobody_knows_the_mode_is_asked_for_before_the_run(tmp_path, what, trial):
    callback = {
        "Checkpoint": lambda: Checkpoint(tmp_path / "x", every=1, monitor="grad_norm"),
        "EarlyStopping": lambda: EarlyStopping("grad_norm", patience=1, every=1),
    }[what]()
    began = []

    class Began(Callback):
        def on_fit_start(self, run):
            began.append(run)

    told = rf"(?s)`{what}\(mode=...\)` is needed.*'grad_norm'.*Expected: 'min' or 'max'.*directed\("
    with pytest.raises(ValueError, match=told):
        em.Trainer(
            directed_in(f1), meta_batch_size=1, fast_dev_run=trial, callbacks=[Began(), callback]
        ).fit(tiny_mlp(), em.tasks.Sinusoid(2, 2), 1)
    assert not began and not (tmp_path / "x").exists()


def test_what_another_monitor_has_seen_is_not_taken_over(tmp_path):
    def fit(steps, mode, resume=None):
        stopping = EarlyStopping("accuracy", patience=3, every=1, mode=mode)
        saving = Checkpoint(tmp_path, every=1)
        boring_fit(steps, strategy=Rising(), callbacks=[stopping, saving], resume=resume)
        return stopping.state_dict()

    assert fit(3, "min")["waited"] == 2
    # The first observation of the other direction is its best so far.
    assert fit(4, None, "auto") == {
        "monitor": "accuracy", "mode": "max", "best": pytest.approx(0.4), "best_step": 4,
        "waited": 0, "observed": True,
    }  # fmt: skip
