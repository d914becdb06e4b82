"""The meta-gradient through every optimizer of optax and optax.contrib that an inner loop takes:
both modes against finite differences in float64."""

import inspect

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from optax import contrib

import eqxmeta as em

RATE = 0.05


def own(update):
    """A transformation of the user's own, of each gradient by itself."""
    return optax.stateless(lambda grads, params: jax.tree.map(update, grads))


OWN = {
    # What is divided by zero is selected against.
    "1 / norm": lambda g: jnp.where(jnp.any(g != 0), -RATE * g * (1 / jnp.sum(g * g) ** 0.5), 0.0),
    "power": lambda g: -RATE * g * (g * g) ** 0.25,
    "logarithm": lambda g: -RATE * jnp.where(g == 0, 0.0, g * jnp.log(jnp.abs(g))),
    "cond": lambda g: jax.lax.cond(
        jnp.any(g != 0), lambda: -RATE * g / jnp.linalg.norm(g), lambda: 0 * g
    ),
    "scan": lambda g: jax.lax.scan(lambda c, _: (c / jnp.sqrt(1 + c * c), None), -g, None, 2)[0],
}
ALIASES = """
    adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars
    lion nadam nadamw novograd radam rmsprop rprop sgd sign_sgd signum
    sm3 yogi
""".split()  # noqa: SIM905
CONTRIB = """
    acprop ademamix adopt dadapt_adamw dowg madgrad momo momo_adam muon prodigy
    schedule_free_adamw schedule_free_sgd simplified_ademamix
""".split()  # noqa: SIM905
OPTIMIZERS = {
    **{name: getattr(optax, name)(RATE) for name in ALIASES},
    **{f"contrib.{name}": getattr(contrib, name)(RATE) for name in CONTRIB},
    "noisy_sgd": optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "contrib.cocob": contrib.cocob(),
    "contrib.schedule_free": contrib.schedule_free(optax.sgd(RATE), RATE),
    "contrib.mechanize": contrib.mechanize(optax.sgd(RATE)),
    "contrib.reduce_on_plateau": optax.chain(optax.sgd(RATE), contrib.reduce_on_plateau()),
    "contrib.sam": contrib.sam(optax.sgd(RATE), optax.sgd(0.01)),
    "adafactor, factored": optax.adafactor(RATE, min_dim_size_to_factor=2),
    "adagrad from 0": optax.adagrad(RATE, initial_accumulator_value=0.0),
    "rmsprop, centered": optax.rmsprop(RATE, centered=True),
    "lars, decay": optax.lars(RATE, weight_decay=0.1),
    "momentum": optax.sgd(RATE, momentum=0.9, nesterov=True),
    "masked": optax.masked(optax.lamb(RATE), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi_transform": optax.multi_transform(
        {"a": optax.lamb(RATE), "b": optax.adam(RATE)},
        lambda p: jax.tree.map(lambda x: "a" if x.ndim == 1 else "b", p),
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.lamb)(RATE),
    "apply_if_finite": optax.apply_if_finite(optax.lamb(RATE), 3),
    "flatten": optax.flatten(optax.adam(RATE)),
    "clip, far below": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
    "adaptive clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.5)),
    "trust ratio": optax.chain(optax.trace(0.9), optax.scale_by_trust_ratio(), optax.scale(-RATE)),
    **{f"own {name}": own(update) for name, update in OWN.items()},
}
# They want what an inner step does not have, the gradient of each example, a Hessian or a line
# search; the others keep a leaf in their state that is no array and changes. `polyak_sgd` is taken,
# but its rate is made of the loss, which counts as a constant: its meta-gradient is another.
NOT_FOR_INNER_LOOPS = {
    "lbfgs", "contrib.dpsgd", "optimistic_adam", "optimistic_adam_v2",
    "optimistic_gradient_descent", "contrib.galore", "contrib.dog", "contrib.sophia",
    "polyak_sgd",
}  # fmt: skip
# `test_meta_gradient` has Adam among its fast ones, `test_verdicts` RAdam.
FAST = {"lamb", "own 1 / norm"}


class Net(eqx.Module):
    """`unused` by both losses, `late` by the inner one; and leaves that are not learnt."""

    w: Array
    v: Array
    unused: Array
    late: Array
    table: Array
    nothing: None = None

    def __call__(self, x):
        return jnp.tanh(self.w @ x) @ self.v[self.table]


def loss(model, batch, key):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2), {}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_both_modes_are_finite_differences(x64, name):
    rng = np.random.default_rng(0)
    shapes = ((3, 2), (3,), (3,), (2, 2), (5, 2), (5,))
    w, v, unused, late, x, y = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    params, static = eqx.partition(Net(w, v, unused, late, jnp.arange(3)), eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def objective(flat, mode):
        inner = em.InnerLoop(OPTIMIZERS[name], 3, mode)
        model = inner(loss, eqx.combine(unravel(flat), static), (x, y)).model
        return loss(model, (x + 0.3, 2 * y), None)[0] + jnp.sum(jnp.sin(model.late))

    mixed, reverse = (
        np.asarray(jax.jit(jax.grad(lambda flat, m=mode: objective(flat, m)))(flat))
        for mode in ("mixed", "reverse")
    )
    np.testing.assert_allclose(mixed, reverse, rtol=1e-9, atol=1e-12)
    value, h = jax.jit(jax.vmap(lambda flat: objective(flat, "reverse"))), 1e-5
    up, down = (value(flat[None] + s * h * jnp.eye(flat.size)) for s in (1, -1))
    np.testing.assert_allclose(mixed, (up - down) / (2 * h), rtol=1e-5, atol=1e-7)


def test_none_is_left_out():
    """Whatever in optax has a learning rate."""
    found = set()
    for module, prefix in ((optax, ""), (contrib, "contrib.")):
        for name in dir(module):
            fun = getattr(module, name)
            if inspect.isfunction(fun) and not name.startswith(("scale_by", "_")):
                named = inspect.signature(fun).parameters
                found |= {prefix + name} if "learning_rate" in named else set()
    assert found - NOT_FOR_INNER_LOOPS - set(OPTIMIZERS) == set()


@pytest.mark.parametrize("mode", ["mixed", pytest.param("reverse", marks=pytest.mark.slow)])
def test_arrays_that_the_inner_loss_does_not_use(mode):
    """By hand: w <- w - r m with LAMB's m of one number, its sign times |w|; so the query loss
    depends on w alone, and its derivative in the unused array is zero."""

    class Line(eqx.Module):
        w: Array
        unused: Array

        def __call__(self, x):
            return self.w * x

    x = jnp.array([[1.0], [2.0]])
    inner = em.InnerLoop(optax.lamb(0.1), 2, mode)

    def objective(model):
        return em.losses.mse(inner(em.losses.mse, model, (x, 2 * x)).model, (x, 3 * x), None)[0]

    grads = jax.jit(jax.grad(objective))(Line(jnp.array([0.5]), jnp.array([1.0, 2.0, 3.0])))
    assert np.array_equal(grads.unused, np.zeros(3))
    # Two steps towards 2, each of a tenth of |w|: w = 1.21 w_0; the loss is 2.5 (w - 3)^2.
    np.testing.assert_allclose(grads.w, 2 * 2.5 * (1.21 * 0.5 - 3) * 1.21, rtol=1e-4)
