"""Arrays of a task as a whole, without an example axis, and sets without labels."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import BoringModel, BoringTasks, boring_fit, host_batch, same_bits
from ..helpers import tree_allclose

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
INNER = em.InnerLoop(optax.sgd(0.05), 2)


class Shifted(eqx.Module):
    """`BoringTasks` with another number added to the targets of each task: by hand (`kind` is
    `None`), or by the loss, which finds it in the task."""

    kind: str | None = None

    def sample(self, key):
        task, shift = BoringTasks().sample(key), jax.random.normal(key, (5,))
        if self.kind is None:
            return jax.tree.map(lambda y: y + shift.sum() if y.shape[1:] == (1,) else y, task)
        more = {"scalar": shift.sum(), "vector": shift, "key": key}[self.kind]
        return em.Task((*task.support, more), (*task.query, more))


def loss(model, batch, key):
    x, y, *more = batch
    for shift in more:
        if jnp.issubdtype(shift.dtype, jax.dtypes.prng_key):
            shift = jax.random.normal(shift, (5,))
        y = y + jnp.sum(shift)
    return em.losses.mse(model, (x, y), key)


STRATEGIES = {
    "MAML": em.MAML(loss, INNER, SGD),
    "one at a time": em.MAML(loss, INNER, SGD, task_chunk=1),
    "Reptile": em.Reptile(loss, INNER, SGD, batch_size=2),
    "Joint": em.Joint(loss, INNER, SGD),
}


def batch_of(source, count=3):
    return jax.vmap(source.sample)(jax.random.split(KEY, count))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("MAML", "scalar"), ("MAML", "key"), ("one at a time", "key"), ("Reptile", "vector"),
     ("Reptile", "key"), ("Joint", "vector")],
)  # fmt: skip
def test_an_outer_step_is_that_of_the_same_tasks_written_out(name, kind):
    """Minibatches and pooling, too, are of the examples alone."""
    strategy = STRATEGIES[name]
    new, by_hand = (
        strategy.outer_update(strategy.init(BoringModel()), batch_of(Shifted(k)), key=KEY)
        for k in (kind, None)
    )
    assert tree_allclose(new, by_hand, rtol=1e-5)
    assert not tree_allclose(new[0].model, BoringModel())


def test_a_run_and_an_evaluation_of_tasks_with_keys():
    strategy = STRATEGIES["MAML"]
    state = boring_fit(2, strategy=strategy, tasks=Shifted("key"))
    ours, theirs = (
        em.evaluate(strategy, state.model, source, num_tasks=3)
        for source in (Shifted("key"), Shifted())
    )
    assert tree_allclose(ours.values, theirs.values, rtol=1e-5)
    same = em.evaluate(strategy, state.model, batch_of(Shifted("key")))
    assert same.values["loss"].shape == (3, 3) and np.all(np.isfinite(same.values["loss"]))


def test_what_is_not_finite_is_told_of_with_keys_too():
    def bad(model, batch, key):
        return loss(model, batch, key)[0] * jnp.inf, {}

    strategy = em.FOMAML(bad, em.InnerLoop(SGD, 1), SGD)
    with pytest.raises(em.NonFiniteError, match="data of that step is finite"):
        boring_fit(2, strategy=strategy, tasks=Shifted("key"))


class Rollouts(eqx.Module):
    """A key and a goal `[2]`: no examples at all."""

    def sample(self, key):
        goal = jax.random.normal(key, (2,))
        return em.Task((key, goal), (jax.random.fold_in(key, 1), goal))


def test_tasks_without_examples():
    """Nor are the numbers of the goal any: pooled, it is what it was."""

    def loss(model, batch, key):
        noise, goal = batch
        return jnp.sum((model(jax.random.normal(noise, (3,))) - goal) ** 2), {}

    strategy = em.MAML(loss, em.InnerLoop(SGD, 1), SGD)
    state = boring_fit(2, strategy=strategy, tasks=Rollouts())
    first = em.evaluate(strategy, state.model, Rollouts(), num_tasks=2)
    again = em.evaluate(strategy, state.model, Rollouts(), num_tasks=2)
    assert same_bits(first.values["loss"], again.values["loss"])
    batch = batch_of(Rollouts())
    joint = em.Joint(loss, INNER, SGD)
    _, metrics = joint.outer_update(joint.init(BoringModel()), batch, key=None)
    of_support = jax.vmap(lambda support: loss(BoringModel(), support, None)[0])(batch.support)
    np.testing.assert_allclose(metrics["pooled_loss"], np.mean(of_support), rtol=1e-5)


def test_a_host_source_with_an_array_of_the_task():
    class Hosted:
        def __getitem__(self, step):
            batch, shift = host_batch(step), np.float32([step, 2 * step])
            return em.Task((*batch.support, shift), (*batch.query, shift))

    state = boring_fit(2, strategy=STRATEGIES["MAML"], tasks=Hosted())
    assert int(state.step) == 2


def test_pooled_and_counted():
    task = em.Task(
        (jnp.ones((2, 3)), jnp.zeros(()), jnp.arange(5.0)),
        (jnp.ones((4, 3)), jnp.ones(()), jnp.zeros(5)),
    )
    x, scalar, vector = task.pooled
    assert x.shape == (6, 3) and float(scalar) == 0
    np.testing.assert_array_equal(vector, np.arange(5.0))


# Sets without labels.


class Unlabelled(eqx.Module):
    form: object

    def sample(self, key):
        task = BoringTasks().sample(key)
        return em.Task(self.form(task.support[0]), task.query)


class Centred(em.GradientStrategy):
    """Adapts the bias such that the mean prediction of the support set is zero."""

    loss: em.Loss
    optimizer: optax.GradientTransformation

    def inner_adapt(self, model, support, *, key=None):
        (x,) = jax.tree.leaves(support)
        mean = jnp.mean(em.losses.predict(model, x), axis=0)
        return eqx.tree_at(lambda m: m.bias, model, model.bias - mean)


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x, None), lambda x: {"x": x}], ids=["x", "(x, None)", "dict"]
)
def test_a_support_set_needs_no_labels_where_the_strategy_needs_none(form):
    source, strategy = Unlabelled(form), Centred(em.losses.mse, SGD)
    state = strategy.init(BoringModel())
    new, metrics = strategy.outer_update(state, batch_of(source), key=None)
    assert np.isfinite(metrics["loss"]) and not tree_allclose(new.model, state.model)
    model = eqx.tree_at(lambda m: m.weight, new.model, jnp.array([1.0, 2.0, 3.0]))
    task = source.sample(KEY)
    adapted = strategy.inner_adapt(model, task.support)
    np.testing.assert_allclose(
        np.mean(em.losses.predict(adapted, jax.tree.leaves(task.support)[0])), 0, atol=1e-5
    )
    if isinstance(task.support, dict):
        state = boring_fit(2, strategy=strategy, tasks=source)
        assert em.evaluate(strategy, state.model, source, num_tasks=2).metrics == ("loss",)


def test_the_error_of_such_a_strategy_is_its_own():
    """Not a remark on the labels that the loss does not find in the support set."""

    class Broken(Centred):
        def inner_adapt(self, model, support, *, key=None):
            raise ZeroDivisionError("mine")

    strategy = Broken(em.losses.mse, SGD)
    with pytest.raises(ZeroDivisionError, match="mine"):
        boring_fit(2, strategy=strategy, tasks=Unlabelled(lambda x: x))
