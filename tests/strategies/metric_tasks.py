"""What the tests of strategies without inner steps share: tasks, and numbers of another library."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqxmeta as em

# Features of five support examples of classes 0, 1, 0, 2, 1, and of three queries. What easyfsl
# 1.5.0 (torch 2.13, float64) says of them stands in the tests.
SUPPORT = np.array(
    [[1, 2, 0, -1], [0, 1, 1, 3], [2, 2, -1, 0], [-1, 0, 2, 1], [0.5, -0.5, 1.5, 2]], float
)
LABELS = np.array([0, 1, 0, 2, 1])
QUERIES = np.array([[1, 1, 1, 1], [0, 2, -1, 0.5], [-2, 0.5, 1, 0]], float)


def wide(tree):
    """In float64."""
    floating = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)


def task_of(seed: int, labels=LABELS, queries: int = 6) -> em.Task:
    """Of float64, with a query of each class at least."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    y = np.resize(classes, queries)
    x = (jnp.asarray(rng.normal(size=(n, 4))) for n in (len(labels), queries))
    return em.Task(*zip(x, (jnp.asarray(labels), jnp.asarray(y)), strict=True))


def padded(task: em.Task, more: int = 3) -> em.Task:
    """With weights, and `more` examples of weight 0 in front and behind, which hold NaN."""

    def of(batch):
        x, y = batch
        blank = jnp.full((more, *x.shape[1:]), jnp.nan)
        target = jnp.full((more, *y.shape[1:]), jnp.nan) if y.dtype.kind == "f" else None
        none = jnp.zeros((more, *y.shape[1:]), y.dtype) if target is None else target
        weight = jnp.concatenate([jnp.zeros(more), jnp.ones(len(x)), jnp.zeros(more)])
        return jnp.concatenate([blank, x, blank]), jnp.concatenate([none, y, none]), weight

    return em.Task(of(task.support), of(task.query))


@eqx.filter_jit
def answers(strategy, model, support, x):
    """What is predicted for `x`, adapted to `support`: one program."""
    return em.losses.predict(strategy.inner_adapt(model, support), x)


def outer_step(strategy, state, task: em.Task):
    """One step on one task. Of plain descent at a rate of 1 it is minus the meta-gradient."""
    return strategy.outer_update(state, jax.tree.map(lambda x: x[None], task), key=None)


def along(strategy, model, task: em.Task, loss) -> None:
    """The outer step of plain descent at a rate of 1 against `loss(learnt)`, a loss of NumPy: its
    value, and its slope along the step, by finite differences."""
    before = strategy.init(model)
    after, metrics = outer_step(strategy, before, task)

    def moved(t: float):
        def move(a, b):
            if not eqx.is_inexact_array(a):
                return a
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            return a + t * (b - a)

        return jax.tree.map(move, before.model, after.model)

    np.testing.assert_allclose(metrics["loss"], loss(moved(0.0)), rtol=1e-12)
    slope = (loss(moved(1e-7)) - loss(moved(-1e-7))) / 2e-7
    np.testing.assert_allclose(slope, -(metrics["grad_norm"] ** 2), rtol=1e-5)
    extras = (eqx.filter(s.model.extra, eqx.is_inexact_array) for s in (before, after))
    assert optax.tree.norm(optax.tree.sub(*extras)) > 1e-4


@eqx.filter_jit
def meta_gradient(strategy, model, task: em.Task, x):
    """`(loss, metrics, predictions for x, gradient)` of one task."""
    params, rest = em.partition_learnt(strategy, model)

    def objective(params):
        model = eqx.combine(params, rest)
        loss, metrics = strategy.task_loss(model, task, step=jnp.int32(0), key=None)
        return loss, (metrics, em.losses.predict(strategy.inner_adapt(model, task.support), x))

    (loss, (metrics, found)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return loss, metrics, found, grads


def assert_padding_is_nothing(strategy, model, task: em.Task) -> None:
    """Of a task with padding, and of the same cut to its true size: the predictions for its
    queries, its loss and its meta-gradient."""
    learnt = strategy.init(model).model
    (*ours, whole, grads), (*theirs, cut, expected) = (
        meta_gradient(strategy, learnt, t, task.query[0]) for t in (padded(task), task)
    )
    if isinstance(whole, tuple):
        np.testing.assert_allclose(whole, cut, rtol=1e-12, atol=1e-12)
    else:  # no more logits are known of than there are examples
        classes = cut.shape[1]
        np.testing.assert_allclose(whole[:, :classes], cut, rtol=1e-12, atol=1e-12)
        assert np.isneginf(whole[:, classes:]).all()
    assert optax.tree.norm(expected) > 1e-3
    for a, b in zip(*map(jax.tree.leaves, ((ours, grads), (theirs, expected))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def softmax(logits) -> np.ndarray:
    p = np.exp(np.asarray(logits) - np.max(logits, axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
