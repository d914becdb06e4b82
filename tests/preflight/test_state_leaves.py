"""Leaves of a state that are no arrays: legal while no step changes them, else refused by name.

In a compiled loop each of them has the value that it had when the loop was traced.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from ..boring import BoringModel, BoringStrategy, BoringTasks, boring_fit, compilations
from ..helpers import tree_allclose

X, Y = jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 1))
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"


class Extra(BoringStrategy):
    """Keeps `first` beside the momentum, and makes `change` of it at every step."""

    first: Any = None
    change: Callable = lambda x: x
    of_model: bool = False

    def init(self, model):
        state = BoringStrategy.init(self, model)
        if self.of_model:
            return em.TrainState(state.step, (model, self.first), state.opt_state)
        return em.TrainState(state.step, model, {"momentum": state.opt_state, "extra": self.first})

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        if self.of_model:
            model, extra = state.model
            inner = em.TrainState(state.step, model, state.opt_state)
            new, metrics = BoringStrategy.outer_update(self, inner, tasks, key=key)
            return em.TrainState(new.step, (new.model, self.change(extra)), new.opt_state), metrics
        inner = em.TrainState(state.step, state.model, state.opt_state["momentum"])
        new, metrics = BoringStrategy.outer_update(self, inner, tasks, key=key)
        extra = self.change(state.opt_state["extra"])
        return em.TrainState(new.step, new.model, {"momentum": new.opt_state, "extra": extra}), (
            metrics
        )


class Static(eqx.Module):
    number: int = eqx.field(static=True)


CHANGES = {
    "numbers": ({"scale": 1.0, "n": 0}, lambda x: {"scale": x["scale"] / 2, "n": x["n"] + 1},
                r"\['n'\]: 0 -> 1; \S+\['scale'\]: 1\.0 -> 0\.5"),
    "a string": ("a", lambda x: x + "b", "'a' -> 'ab'"),
    "a bool": (True, lambda x: not x, "True -> False"),
    "None becomes an array": (None, lambda x: jnp.ones(2), r"None -> float32\[2\]"),
    "None becomes a number": (None, lambda x: 1, "None -> 1"),
    "a number becomes None": (1, lambda x: None, "1 -> None"),
    "an array becomes None": (np.ones(2, np.float32), lambda x: None, r"float32\[2\] -> None"),
    "a number becomes an array": (1.5, lambda x: jnp.float32(x), r"1\.5 -> float32\[\]"),
    "an array becomes a number": (np.float32(1), lambda x: 1.0, r"float32\[\] -> 1\.0"),
    "a function": (jnp.sin, lambda x: lambda y: y, "sin.* -> <function"),
    "a static field": (Static(0), lambda x: Static(x.number + 1), "0.* -> .*1"),
    "a list becomes a tuple": ([1], lambda x: (1,), r"\[\*\]\) -> .*\(\*,\)"),
}  # fmt: skip


@pytest.mark.parametrize(("first", "change", "told"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_refused_before_the_run(first, change, told):
    strategy = Extra(first=first, change=change)
    message = rf"`Extra\.outer_update`[^\n]*\nReceived: opt_state\['extra'\].*{told}"
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        boring_fit(3, strategy=strategy)
    assert compiled == []


def test_by_hand_it_may_change():
    first, change, _ = CHANGES["numbers"]
    strategy = Extra(first=first, change=change)
    state = strategy.init(BoringModel())
    for step in range(3):
        tasks = jax.vmap(BoringTasks().sample)(jax.random.split(jax.random.key(step), 2))
        state, _ = strategy.outer_update(state, tasks, key=None)
    assert state.opt_state["extra"] == {"scale": 0.125, "n": 3}


def test_the_model_and_the_other_doors():
    changing = {"change": lambda x: x + 1, "first": 0}
    with pytest.raises(ValueError, match=r"Received: model\[1\]: 0 -> 1"):
        boring_fit(3, strategy=Extra(**changing, of_model=True))
    trainer = em.Trainer(Extra(**changing), meta_batch_size=2, summary=False)
    for run in (
        lambda: trainer.plan(BoringModel(), BoringTasks()),
        lambda: em.fit_seeds(trainer, BoringModel(), BoringTasks(), 3, seeds=2),
    ):
        with pytest.raises(ValueError, match=r"Received: opt_state\['extra'\]: 0 -> 1"):
            run()


def test_what_no_step_changes_is_legal():
    kept = {"a": 3, "b": "text", "c": jnp.sin, "d": None, "e": float("nan"), "f": Static(1)}
    state = boring_fit(3, strategy=Extra(first=kept))
    assert state.opt_state["extra"] == kept
    assert tree_allclose(state.model, boring_fit(3).model)


# The same of optimizers.


def counting(first, change):
    """Gradient descent, and a state that changes."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, grads), {"n": change(state["n"])}

    return optax.GradientTransformation(lambda params: {"n": first}, update)


def strategies(optimizer):
    """With it as the inner optimizer, carried from step to step or not, and as the outer one."""
    inner, sgd = em.InnerLoop(optimizer, 3), optax.sgd(0.1)
    return {
        "inner": em.MAML(em.losses.mse, inner, sgd),
        "carried": em.Reptile(em.losses.mse, inner, sgd, inner_state="carry"),
        "outer": em.MAML(em.losses.mse, em.InnerLoop(sgd, 3), optimizer),
    }


@pytest.mark.parametrize("where", ["inner", "carried", "outer"])
@pytest.mark.parametrize("name", ["a bool", "a string", "an array becomes a number"])
def test_a_change_in_the_state_of_an_optimizer_is_refused(name, where):
    first, change, told = CHANGES[name]
    # The inner optimizer makes its state while JAX traces.
    first = jnp.asarray(first) if isinstance(first, np.generic) else first
    strategy = strategies(counting(first, change))[where]
    with compilations() as compiled, pytest.raises(ValueError, match=rf"\['n'\]: {told}"):
        boring_fit(3, strategy=strategy)
    assert compiled == []


@pytest.mark.parametrize(
    ("where", "first"), [("inner", 3), ("inner", "text"), ("inner", jnp.sin), ("carried", "text")]
)
def test_what_it_keeps_is_legal(where, first):
    """Steps as those of `optax.sgd`."""
    ours, plain = (
        strategies(optimizer)[where] for optimizer in (counting(first, lambda x: x), optax.sgd(0.1))
    )
    adapted = ours.inner_adapt(BoringModel(), (X, Y))
    assert tree_allclose(adapted, plain.inner_adapt(BoringModel(), (X, Y)))
    if where == "carried":
        assert boring_fit(2, strategy=ours).opt_state.inner == {"n": first}


def test_an_inner_optimizer_may_count_in_an_array():
    """After three steps at rates of 0.1, 0.05 and 0.025, of which the number is kept in float32."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -state * g, grads), state / 2

    halving = optax.GradientTransformation(lambda params: jnp.asarray(0.1), update)
    loop = em.InnerLoop(halving, 3)
    done = loop(lambda m, batch, key: (jnp.sum(m**2), {}), jnp.ones(1), (X, Y))
    np.testing.assert_allclose(done.model, (1 - 0.2) * (1 - 0.1) * (1 - 0.05), rtol=1e-6)
    np.testing.assert_allclose(done.opt_state, 0.1 / 8, rtol=1e-6)
