"""Conditional neural processes, against the paper's equations in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em

from .metric_tasks import along, answers, assert_padding_is_nothing, wide

ENCODER, DECODER = jax.random.split(jax.random.key(0))
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
LOSS = em.losses.gaussian_nll


def encoder() -> eqx.nn.MLP:
    return eqx.nn.MLP(3, 4, 8, 1, activation=jnp.tanh, key=ENCODER)


def decoder(outputs: int = 4) -> eqx.nn.MLP:
    return eqx.nn.MLP(4 + 1, outputs, 8, 1, activation=jnp.tanh, key=DECODER)


def cnp(g, **options) -> em.CNP:
    return em.CNP(LOSS, optax.sgd(1.0), decoder=g, **options)


def task_of(seed: int, shots: int = 5) -> em.Task:
    """`x: [1]`, `y: [2]`."""
    rng = np.random.default_rng(seed)
    draw = lambda n: (jnp.asarray(rng.normal(size=(n, 1))), jnp.asarray(rng.normal(size=(n, 2))))  # noqa: E731
    return em.Task(draw(shots), draw(4))


def mlp(model: eqx.nn.MLP, x) -> np.ndarray:
    first, last = model.layers
    hidden = np.tanh(np.asarray(x) @ np.asarray(first.weight).T + np.asarray(first.bias))
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def by_hand(learnt, support, x, min_scale=0.1) -> tuple[np.ndarray, np.ndarray]:
    """Equations 1 to 3: the means and scales, `[queries, 2]` each."""
    r = np.mean([mlp(learnt.model, np.concatenate(pair)) for pair in zip(*support, strict=True)], 0)
    out = np.stack([mlp(learnt.extra, np.concatenate([r, q])) for q in np.asarray(x)])
    return out[:, :2], min_scale + (1 - min_scale) * np.log1p(np.exp(out[:, 2:]))


def test_predictions_against_the_equations(x64):
    for shots, options in ((5, {}), (1, {"min_scale": 0.0})):
        strategy, task = cnp(wide(decoder()), **options), task_of(1, shots)
        learnt = strategy.init(wide(encoder())).model
        found = answers(strategy, learnt, task.support, task.query[0])
        expected = by_hand(learnt, task.support, task.query[0], **options)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_order_of_the_support_set_does_not_matter(x64):
    strategy, task = cnp(wide(decoder())), task_of(2)
    learnt = strategy.init(wide(encoder())).model
    x, y = task.support
    order = np.array([3, 1, 4, 0, 2])
    found, again, others = (
        np.stack(answers(strategy, learnt, support, task.query[0]))
        for support in ((x, y), (x[order], y[order]), (x, y[order]))
    )
    np.testing.assert_allclose(again, found, rtol=1e-13)
    assert np.abs(others - found).max() > 1e-3  # which target is whose does


def test_the_outer_step_descends_the_likelihood(x64):
    task = task_of(3)
    x, y = task.query

    def loss(learnt):
        mean, scale = by_hand(learnt, task.support, x)
        density = np.exp(-(((np.asarray(y) - mean) / scale) ** 2) / 2) / (
            scale * (2 * np.pi) ** 0.5
        )
        return -np.mean(np.log(density))

    along(cnp(wide(decoder())), wide(encoder()), task, loss)


def test_padding_is_nothing(x64):
    """Nor for modules that normalise by the support set. Its targets are NaN too."""
    h, g = (
        eqx.nn.Sequential([em.nn.SupportNorm(n), module])
        for n, module in ((3, encoder()), (5, decoder()))
    )
    assert_padding_is_nothing(cnp(wide(g)), wide(h), task_of(4))


def sines() -> em.tasks.Sinusoid:
    return em.tasks.Sinusoid(5, 10, phase=(0, np.pi), x_range=(-2.0, 2.0))


@pytest.mark.slow
def test_it_learns_and_what_it_knows_is_from_the_support_set():
    """Against the same model with the support set of another wave; its scales are those of its
    errors."""
    h = eqx.nn.MLP(2, 64, 64, 2, key=ENCODER)
    g = eqx.nn.MLP(65, 2, 64, 2, key=DECODER)
    strategy = em.CNP(LOSS, optax.adam(2e-3), decoder=g)
    trainer = em.Trainer(strategy, meta_batch_size=25, summary=False)
    state = trainer.fit(h, sines(), 1500)
    tasks = jax.vmap(sines().sample)(jax.random.split(jax.random.key(5), 200))
    mixed = em.Task(jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tasks.support), tasks.query)
    before, after, others = (
        em.evaluate(strategy, model, t)
        for model, t in (
            (strategy.init(h).model, tasks),
            (state.model, tasks),
            (state.model, mixed),
        )
    )
    assert after.mean("mse")[-1] < 0.15 * before.mean("mse")[-1]
    assert others.mean("mse")[-1] > 5 * after.mean("mse")[-1]
    assert after.mean()[-1] < before.mean()[-1] - 1
    mean, scale = eqx.filter_vmap(answers, in_axes=(None, None, 0, 0))(
        strategy, state.model, tasks.support, tasks.query[0]
    )
    inside = np.mean(np.abs(tasks.query[1] - mean) < 2 * scale)
    assert 0.9 < inside < 0.995  # 0.954 of a normal distribution


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_are_named():
    for g in (None, eqx.nn.MLP):
        with pytest.raises(TypeError, match=r"`CNP\(decoder=...\)`" + THREE_PARTS):
            cnp(g)
    for scale in (-0.1, 1.0, "small"):
        with pytest.raises(ValueError, match=r"`CNP\(min_scale=...\)`" + THREE_PARTS):
            cnp(decoder(), min_scale=scale)
    strategy = cnp(decoder(2))
    classifier = strategy.inner_adapt(strategy.init(encoder()).model, task_of(0).support)
    with pytest.raises(ValueError, match="another number of outputs" + THREE_PARTS):
        classifier(jnp.ones(1))
