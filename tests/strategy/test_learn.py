"""`learn=`: what is outside of it is not meta-learnt, whatever the strategy and the optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint

from ..boring import same_bits
from ..helpers import TinyMLP, tree_allclose

KEY = jax.random.key(0)
MSE, CROSS_ENTROPY = em.losses.mse, em.losses.cross_entropy
INNER = em.InnerLoop(optax.sgd(0.1), 2)
ADAMW = optax.adamw(0.01, weight_decay=0.1)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"

NAMES = ["MAML", "FOMAML", "Reptile", "MetaSGD", "ANIL", "BOIL", "ProtoNet", "Joint"]


def fast(*names: str):
    marked = [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    return pytest.mark.parametrize("name", marked)


class Lines(eqx.Module):
    """`x: [4, 2]`, twice; labels 0, 1, 0, 1, or values."""

    labelled: bool = eqx.field(static=True, default=False)

    def sample(self, key: Array) -> em.Task:
        x = jax.random.normal(key, (8, 2))
        y = jnp.arange(8) % 2 if self.labelled else jnp.sum(x, axis=1, keepdims=True)
        return em.Task((x[:4], y[:4]), (x[4:], y[4:]))


class Net(eqx.Module):
    """Has a leaf of integers, one that is no array and a `None`."""

    body: eqx.nn.Linear
    head: eqx.nn.Linear
    table: Array
    activation: object
    nothing: None

    def __init__(self):
        keys = jax.random.split(KEY)
        self.body = eqx.nn.Linear(2, 3, key=keys[0])
        self.head = eqx.nn.Linear(3, 1, key=keys[1])
        self.table = jnp.arange(3)
        self.activation, self.nothing = jax.nn.tanh, None

    def __call__(self, x: Array) -> Array:
        return self.head(self.activation(self.body(x))[self.table])


def body(model):
    return model.body


def make(name: str, optimizer=ADAMW, learn=body, **options):
    if name == "ProtoNet":
        return em.ProtoNet(CROSS_ENTROPY, optimizer, learn=learn, **options)
    return getattr(em, name)(MSE, INNER, optimizer, learn=learn, **options)


def tasks_for(strategy) -> Lines:
    return Lines(isinstance(strategy, em.ProtoNet))


def batch_for(strategy) -> em.Task:
    return jax.vmap(tasks_for(strategy).sample)(jax.random.split(KEY, 3))


def trainer(strategy, **options):
    return em.Trainer(strategy, meta_batch_size=2, summary=False, **options)


def own(strategy, model):
    """The user's own model in a state."""
    return model.model if isinstance(strategy, em.MetaSGD) else model


def arrays(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree) if eqx.is_array(x)]


@fast("MAML", "Reptile", "MetaSGD", "Joint")
def test_what_is_outside_stays_to_the_bit(name):
    strategy, model = make(name), Net()
    state = trainer(strategy).fit(model, tasks_for(strategy), 20)
    after = own(strategy, state.model)
    assert same_bits(after.head, model.head) and same_bits(after.table, model.table)
    assert not any(map(np.array_equal, arrays(after.body), arrays(model.body)))
    # Adam keeps two moments of what is learnt, and of nothing else.
    numbers = sum(x.size for x in arrays(state.opt_state) if x.ndim)
    rates = 4 + 9 if name == "MetaSGD" else 0
    assert numbers == 2 * (9 + rates)
    mask = strategy.learnt(state.model)
    assert jax.tree.structure(mask) == jax.tree.structure(state.model)
    assert sum(jax.tree.leaves(mask)) == 2 + 4 * (name == "MetaSGD")


@fast("MAML")
@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_what_is_inside_moves_as_if_all_were_learnt(x64, name, mode):
    """One outer step of plain descent at rate 1 shows the gradient."""
    model = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, Net())
    moved = {}
    for learn in (body, None):
        strategy = make(name, optax.sgd(1.0), learn)
        if name != "ProtoNet":
            strategy = eqx.tree_at(lambda s: s.inner.gradient, strategy, mode)
        state = strategy.init(model)
        new, metrics = strategy.outer_update(state, batch_for(strategy), key=KEY)
        moved[learn] = jax.tree.map(
            lambda a, b: a - b, *(eqx.filter(s.model, eqx.is_inexact_array) for s in (state, new))
        )
        squares = sum(np.sum(x**2) for x in arrays(moved[learn]))
        np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(squares), rtol=1e-9)
    some, every = moved[body], moved[None]
    assert tree_allclose(own(strategy, some).body, own(strategy, every).body, rtol=1e-9)
    assert any(x.any() for x in arrays(own(strategy, some).body))
    if name == "MetaSGD":
        assert tree_allclose(some.extra, every.extra, rtol=1e-9)


def test_the_gradient_is_that_of_finite_differences():
    """In the learnt part alone, though the rest adapts too."""
    strategy = make("MAML", optax.sgd(1.0))
    check = em.check_meta_gradient(strategy, Net(), Lines().sample(KEY))
    assert check.ok and check.mixed_vs_finite_differences < 1e-6


def test_nothing_of_the_model_where_something_else_is_learnt():
    strategy, model = make("MetaSGD", learn=lambda m: ()), Net()
    state = trainer(strategy).fit(model, Lines(), 3)
    assert same_bits(state.model.model, model)
    assert not any(map(np.array_equal, arrays(state.model.extra), [np.ones(1)] * 4))


@pytest.mark.parametrize(
    ("name", "learn", "told"),
    [
        ("MAML", lambda m: (), "chooses nothing"),
        ("MetaSGD", lambda m: None, "chooses nothing"),
        ("MetaSGD", lambda m: m.nothing, "chooses nothing"),
        ("Reptile", lambda m: m.table, "chooses nothing"),
        ("Joint", lambda m: m.body.weight + 1, "not the model's"),
        ("ProtoNet", lambda m: m.__call__, "a method"),
    ],
)
def test_a_learn_that_chooses_nothing_is_refused(name, learn, told):
    with pytest.raises(ValueError, match=rf"`{name}\(learn=...\)`.*{told}{THREE_PARTS}"):
        make(name, learn=learn).init(Net())


@pytest.mark.parametrize("name", NAMES)
def test_a_learn_that_is_no_function_is_refused(as_users_run_it, name):
    with pytest.raises(TypeError, match=rf"`{name}\(learn=...\)`{THREE_PARTS}"):
        make(name, learn=Net().body.weight)


def test_an_optimizer_with_a_label_for_every_leaf():
    """Of those that are not learnt there is nothing to be labelled, and no harm in a label."""
    labels = jax.tree.map(lambda x: "all", eqx.filter(Net(), eqx.is_inexact_array))
    optimizer = optax.multi_transform({"all": ADAMW}, lambda _: labels)
    states = []
    for outer in (optimizer, ADAMW):
        strategy = make("MAML", outer)
        states.append(
            strategy.outer_update(strategy.init(Net()), batch_for(strategy), key=KEY)[0].model
        )
    assert same_bits(*states) and same_bits(states[0].head, Net().head)


def test_the_summary_counts_what_is_learnt(capsys):
    trainer = em.Trainer(make("MAML"), meta_batch_size=2)
    trainer.fit(Net(), Lines(), 1)
    assert "learns      9 meta-parameters: body.weight, body.bias\n" in capsys.readouterr().out
    em.Trainer(make("MAML", learn=None), meta_batch_size=2).fit(Net(), Lines(), 1)
    assert "learns      13 meta-parameters\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MAML", "Joint"])
def test_the_plan_counts_what_is_learnt(name):
    """A body without outer gradient costs fewer operations."""

    def flops(learn):
        inner = em.InnerLoop(optax.sgd(0.1), 2, adapt=lambda m: m.out)
        strategy = getattr(em, name)(MSE, inner, optax.adam(0.1), learn=learn)
        model = eqx.tree_at(lambda m: m.hidden, TinyMLP(KEY), eqx.nn.Linear(1, 8, key=KEY))
        return trainer(strategy).plan(model, em.tasks.Sinusoid(50, 50)).rows[0].flops

    assert flops(lambda m: m.out) < 0.9 * flops(None)


@pytest.mark.parametrize("name", ["MAML", pytest.param("MetaSGD", marks=pytest.mark.slow)])
def test_resumed_it_is_the_run_that_never_was_broken_off(tmp_path, name):
    def fit(folder, steps, learn=body, resume=None):
        callbacks = [Checkpoint(tmp_path / folder, every=2)]
        return trainer(make(name, learn=learn), callbacks=callbacks).fit(
            Net(), Lines(), steps, resume=resume
        )

    whole = fit("whole", 4)
    fit("parts", 2)
    assert same_bits(fit("parts", 4, resume="auto"), whole)
    named = r"(?s)learns='.*body\.weight.*learns=None"
    with pytest.raises(em.CheckpointMismatch, match=named):
        fit("parts", 4, learn=None, resume="auto")
    with pytest.raises(em.CheckpointMismatch, match=r"(?s)body\.bias.*Expected: learns="):
        fit("parts", 4, learn=lambda m: m.body.weight, resume="auto")


@pytest.mark.parametrize("name", ["MAML", pytest.param("Reptile", marks=pytest.mark.slow)])
def test_several_seeds(name):
    strategy, model = make(name), Net()
    runs = em.fit_seeds(trainer(strategy), model, Lines(), 3, seeds=[0, 5])
    alone = trainer(strategy, seed=5).fit(model, Lines(), 3)
    assert tree_allclose(runs.state(1).model, alone.model, rtol=1e-4, atol=1e-6)
    for i in range(2):
        assert same_bits(runs.state(i).model.head, model.head)


class Pull(em.Strategy):
    """An outer step of one's own: everything, or what is learnt, becomes smaller."""

    heedful: bool
    loss: em.Loss = MSE

    def init(self, model):
        return em.TrainState(jnp.int32(0), model, ())

    def inner_adapt(self, model, support, *, key=None):
        return model

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        params, rest = (
            em.partition_learnt(self, state.model)
            if self.heedful
            else eqx.partition(state.model, eqx.is_inexact_array)
        )
        params = jax.jit(lambda params: jax.tree.map(lambda x: 0.5 * x, params))(params)
        new = em.TrainState(state.step + 1, eqx.combine(params, rest), ())
        return new, {"loss": jnp.zeros(())}


def test_an_outer_update_that_does_not_ask_is_refused():
    model = Net()
    state = trainer(Pull(True, learn=body)).fit(model, Lines(), 1)
    assert same_bits(state.model.head, model.head)
    assert same_bits(state.model.body, jax.tree.map(lambda x: 0.5 * x, model.body))
    trainer(Pull(False)).fit(model, Lines(), 1)
    told = rf"`Pull.outer_update`{THREE_PARTS}partition_learnt"
    with pytest.raises(ValueError, match=told) as error:
        trainer(Pull(False, learn=body)).fit(model, Lines(), 1)
    assert "model.head.weight, model.head.bias\n" in str(error.value)


class Handing(Pull):
    """Hands everything on through a `jit` of its own, in another order."""

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        new, metrics = super().outer_update(state, tasks, key=key)
        swap = jax.jit(lambda a, b: (b, a))
        weight, bias = swap(new.model.head.bias, new.model.head.weight)
        model = eqx.tree_at(lambda m: (m.head.weight, m.head.bias), new.model, (weight, bias))
        return em.TrainState(new.step, model, ()), metrics


def test_what_is_handed_on_through_other_functions_is_no_change():
    trainer(Handing(True, learn=body)).fit(Net(), Lines(), 1)


class LearnsScale(em.GradientStrategy):
    """Learns more than the model."""

    loss: em.Loss
    optimizer: optax.GradientTransformation

    def meta_model(self, model):
        return em.MetaParameters(model, jnp.ones(()))

    def inner_adapt(self, model, support, *, key=None):
        return jax.tree.map(
            lambda x: x * model.extra if eqx.is_inexact_array(x) else x, model.model
        )


def test_learn_gets_the_users_own_model():
    model = Net()
    state = trainer(LearnsScale(MSE, ADAMW, learn=body)).fit(model, Lines(), 3)
    assert same_bits(state.model.model.head, model.head)
    assert not same_bits(state.model.model.body, model.body) and float(state.model.extra) != 1


class Narrowed(em.MAML):
    """A strategy that leaves out a part by itself."""

    def learnt(self, model):
        return eqx.tree_at(lambda m: m.body.bias, super().learnt(model), False)


def test_a_strategy_may_narrow_what_is_learnt():
    model = Net()
    state = trainer(Narrowed(MSE, INNER, ADAMW, learn=body)).fit(model, Lines(), 3)
    assert same_bits(state.model.body.bias, model.body.bias)
    assert not same_bits(state.model.body.weight, model.body.weight)


def test_learn_and_adapt_are_independent():
    """The head adapts and is not learnt, the body is learnt and does not adapt."""
    inner = em.InnerLoop(optax.sgd(0.1), 2, adapt=lambda m: m.head)
    strategy, model = em.MAML(MSE, inner, ADAMW, learn=body), Net()
    state = trainer(strategy).fit(model, Lines(), 3)
    adapted = strategy.inner_adapt(state.model, Lines().sample(KEY).support)
    assert same_bits(state.model.head, model.head) and not same_bits(adapted.head, model.head)
    assert same_bits(adapted.body, state.model.body) and not same_bits(adapted.body, model.body)
