"""A note on an error gives advice only where its reason was seen: of others it says where they came
from, and what was received."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxmeta as em
from eqxmeta._errors import takes
from eqxmeta.callbacks import Evaluate

from ..boring import BoringModel, BoringTasks, boring_fit, host_batch

pytestmark = pytest.mark.usefixtures("as_users_run_it")

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
INNER = em.InnerLoop(SGD, steps=1)
TASKS = host_batch(0)
TASK = BoringTasks().sample(KEY)
# What every piece of advice that the library has for the user's own code would say.
ADVICE = ("JAX can trace", "task axis", "of a batch", "lambda m:", "Of one task", "one example",
          "key) ->", "augment(image")  # fmt: skip


def ours(error):
    """The notes that are not JAX's."""
    return [note for note in error.__notes__ if "JAX has removed" not in note]


class Own(Exception):
    """An error of the user's, for a reason of the user's."""


def failing(*args, **kwargs):
    raise Own("the reason")


def key_twice(model, batch, key):
    key = jax.random.key(1)
    noise = jax.random.normal(key, (3,)) + jax.random.normal(key, (3,))
    return em.losses.mse(model, batch, None)[0] + noise.sum(), {}


class Fails(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        failing()


class Source(eqx.Module):
    def sample(self, key):
        failing()


def maml(loss=em.losses.mse, *, inner=INNER, outer=SGD):
    return em.MAML(loss, inner, outer)


def outer_update(strategy, model=None):
    state = strategy.init(BoringModel() if model is None else model)
    return strategy.outer_update(state, TASKS, key=KEY)


# A tree of labels for the whole module, where optax sees its arrays alone.
LABELS = optax.multi_transform(
    {"a": SGD, "b": SGD}, jax.tree.map(lambda x: "a", eqx.nn.MLP(3, 1, 2, 1, key=KEY))
)
FAILING_OPTIMIZER = optax.GradientTransformation(lambda params: (), failing)
FAILING_INIT = optax.GradientTransformation(failing, SGD.update)

OWN = {
    "loss": lambda: boring_fit(1, strategy=maml(failing)),
    "loss, by hand": lambda: outer_update(maml(failing)),
    "model": lambda: outer_update(maml(), Fails(jnp.ones(3))),
    "model of a loss that fails first": lambda: boring_fit(
        1, strategy=maml(failing), model=eqx.nn.Linear(2, 1, key=KEY)
    ),
    "outer optimizer": lambda: boring_fit(1, strategy=maml(outer=FAILING_OPTIMIZER)),
    "outer optimizer's init": lambda: boring_fit(1, strategy=maml(outer=FAILING_INIT)),
    "inner optimizer": lambda: outer_update(maml(inner=em.InnerLoop(FAILING_OPTIMIZER, steps=1))),
    "adapt": lambda: outer_update(maml(inner=em.InnerLoop(SGD, steps=1, adapt=failing))),
    "head": lambda: boring_fit(1, strategy=em.ANIL(em.losses.mse, INNER, SGD, head=failing)),
    "sample": lambda: boring_fit(1, tasks=Source()),
    "augment": lambda: em.tasks.Episodes(
        jnp.zeros((4, 2, 2)), [0, 0, 1, 1], 2, 1, 1, augment=failing
    ),
    "check": lambda: em.check_meta_gradient(maml(failing), BoringModel(), TASK),
    "evaluation": lambda: em.evaluate(maml(failing), BoringModel(), BoringTasks(), num_tasks=2),
    "Evaluate": lambda: boring_fit(
        1, strategy=maml(failing), callbacks=[Evaluate(BoringTasks(), every=1)]
    ),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_the_users_own_error_is_told_where_it_is_from_and_no_more(own):
    with pytest.raises(Own, match="the reason") as caught:
        own()
    (note,) = ours(caught.value)
    assert "came out of " in note and "\nReceived: " in note
    assert note.endswith("\nExpected: a result; why there is none, the error itself says")


def test_labels_for_parts_that_the_optimizer_does_not_see():
    with pytest.raises((ValueError, TypeError)) as caught:
        outer_update(maml(outer=LABELS), eqx.nn.MLP(3, 1, 2, 1, key=KEY))
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert not [advice for advice in ADVICE if advice in notes]


@pytest.mark.parametrize("how", ["outer_update", "fit", "evaluate", "check_meta_gradient"])
def test_a_key_that_is_used_twice(how):
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError) as caught:
        if how == "outer_update":
            outer_update(maml(key_twice))
        elif how == "fit":
            boring_fit(1, strategy=maml(key_twice))
        elif how == "evaluate":
            em.evaluate(maml(key_twice), BoringModel(), BoringTasks(), num_tasks=2)
        else:
            em.check_meta_gradient(maml(key_twice), BoringModel(), TASK)
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert not [advice for advice in ADVICE if advice in notes]


def test_advice_where_its_reason_was_seen():
    """One task where a batch is meant, and the reverse; code that cannot be traced."""
    model = eqx.nn.Linear(1, 1, key=KEY)
    y = jnp.ones((4, 1))
    with pytest.raises(Exception) as caught:
        maml().outer_update(maml().init(model), em.Task((y, y), (y, y)), key=KEY)
    assert "jax.tree.map(lambda x: x[None], task)" in ours(caught.value)[-1]
    with pytest.raises(Exception) as caught:
        em.check_meta_gradient(maml(), BoringModel(), TASKS)
    assert "jax.tree.map(lambda x: x[0], tasks)" in str(caught.value.__notes__)
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        outer_update(maml(lambda m, b, k: (jnp.asarray(float(em.losses.mse(m, b, k)[0])), {})))
    assert "JAX can trace" in ours(caught.value)[-1]


def test_signatures():
    assert takes(lambda model, batch, key: 0, "model", "batch", "key")
    assert not takes(lambda model, batch: 0, "model", "batch", "key")
    assert takes(max, "key") and not takes(3, "key")
