"""Baseline, Baseline++ and SimpleShot: against their papers' formulas in NumPy, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta._task.minibatches import minibatches
from eqxmeta.callbacks import Checkpoint, Evaluate

from ..boring import same_bits
from ..helpers import tree_allclose

KEY = jax.random.key(0)
THREE_PARTS = r"[^\n]+\nReceived: (.|\n)+\nExpected: (.|\n)+"
LOSS = em.losses.cross_entropy
LABELS = np.array([0, 2, 2, 0, 3, 2])  # class 1 is not there
STEPS, RATE, MOMENTUM, DECAY, SCALE = 5, 0.3, 0.9, 0.01, 4.0


def inner(steps=STEPS):
    decay = optax.add_decayed_weights(DECAY)
    return em.InnerLoop(optax.chain(decay, optax.sgd(RATE, momentum=MOMENTUM)), steps)


MADE = {
    em.Baseline: lambda **options: em.Baseline(LOSS, inner(), optax.sgd(0.5), **options),
    em.BaselinePlusPlus: lambda **options: em.BaselinePlusPlus(
        LOSS, inner(), optax.sgd(0.5), scale=SCALE, **options
    ),
    em.SimpleShot: lambda **options: em.SimpleShot(LOSS, optax.sgd(0.5), **options),
}
each = pytest.mark.parametrize("cls", MADE)


def body() -> eqx.nn.MLP:
    return eqx.nn.MLP(4, 3, 8, 1, key=KEY)


def points(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 4))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def descended(weights: dict, gradient) -> dict:
    """SGD with momentum and weight decay."""
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(STEPS):
        g = gradient(weights, step)
        velocity = {n: MOMENTUM * velocity[n] + g[n] + DECAY * weights[n] for n in weights}
        weights = {n: weights[n] - RATE * velocity[n] for n in weights}
    return weights


def linear_by_hand(f: np.ndarray, y: np.ndarray, queries: np.ndarray, rows=None) -> np.ndarray:
    """Logistic regression from zero, of the classes that are there: `[queries, classes]`. `rows`:
    the examples of each step."""
    targets = np.eye(y.max() + 1)[y]
    there = targets.any(axis=0)

    def gradient(w, step):
        p = np.zeros_like(targets)
        p[:, there] = softmax((f @ w["weight"].T + w["bias"])[:, there])
        seen = slice(None) if rows is None else rows[step]
        errors = (p - targets)[seen]
        return {"weight": errors.T @ f[seen] / len(errors), "bias": errors.mean(axis=0)}

    zeros = {"weight": np.zeros((len(there), f.shape[1])), "bias": np.zeros(len(there))}
    w = descended(zeros, gradient)
    return np.where(there, queries @ w["weight"].T + w["bias"], -np.inf)


def cosine_by_hand(f: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Of `s cos(w, f)` the derivative in w is `s (f/|f| - cos w/|w|) / |w|`."""
    targets = np.eye(y.max() + 1)[y]
    there = targets.any(axis=0)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def gradient(w, step):
        weight = w["weight"]
        cosines = unit(f) @ unit(weight).T
        p = np.zeros_like(targets)
        p[:, there] = softmax(SCALE * cosines[:, there])
        slopes = SCALE * (p - targets) / len(y)  # [examples, classes]
        towards = slopes.T @ unit(f) - (slopes * cosines).sum(axis=0)[:, None] * unit(weight)
        return {"weight": towards / np.linalg.norm(weight, axis=1, keepdims=True)}

    head = MADE[em.BaselinePlusPlus]().new_head(len(there), f.shape[1])
    w = descended({"weight": np.asarray(head.weight)}, gradient)
    return np.where(there, SCALE * unit(queries) @ unit(w["weight"]).T, -np.inf)


def centroid_by_hand(f, y, queries, mean) -> np.ndarray:
    """CL2N."""
    z, q = ((x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (f, queries))
    columns = [
        -((q - z[y == k].mean(axis=0)) ** 2).sum(axis=1) if k in y else np.full(len(q), -np.inf)
        for k in range(y.max() + 1)
    ]
    return np.stack(columns, axis=1)


def logits_of(strategy, model, support, x, jit=False) -> np.ndarray:
    def run(support):
        return jax.vmap(strategy.inner_adapt(model, support))(x)

    return np.asarray((jax.jit(run) if jit else run)(support))


@each
def test_logits_against_the_formulas(cls, x64):
    """With a class that is not there; of a body, and of features that are there already."""
    x, queries, base = points(6), points(5, 1), points(40, 2)
    for model in (body(), eqx.nn.Identity()):
        model = jax.tree.map(lambda w: w.astype(float) if eqx.is_array(w) else w, model)
        f, q, b = (np.asarray(jax.vmap(model)(part)) for part in (x, queries, base))
        options = {"center": jnp.asarray(base)} if cls is em.SimpleShot else {}
        strategy = MADE[cls](ways=4, **options)
        logits = logits_of(strategy, model, (x, jnp.asarray(LABELS)), queries, jit=True)
        expected = {
            em.Baseline: lambda f=f, q=q: linear_by_hand(f, LABELS, q),
            em.BaselinePlusPlus: lambda f=f, q=q: cosine_by_hand(f, LABELS, q),
            em.SimpleShot: lambda f=f, q=q, b=b: centroid_by_hand(f, LABELS, q, b.mean(axis=0)),
        }[cls]()
        np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_head_that_is_trained_on_minibatches(x64):
    support, queries = (jnp.asarray(points(6)), jnp.asarray(LABELS)), points(5, 1)
    strategy = MADE[em.Baseline](ways=4, batch_size=4)
    _, rows = minibatches(support, 4, STEPS, None)
    assert rows.shape == (STEPS, 4) and len({tuple(sorted(r)) for r in rows.tolist()}) > 1
    logits = logits_of(strategy, eqx.nn.Identity(), support, queries)
    expected = linear_by_hand(points(6), LABELS, queries, np.asarray(rows))
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-12)


@each
def test_padding_is_absence(cls, x64):
    x, y = jnp.asarray(points(6)), jnp.asarray(LABELS)
    padded = jnp.concatenate([x[:3], jnp.full((2, 4), jnp.nan), x[3:], x[:1] + 3])
    labels = jnp.array([*LABELS[:3], 0, 0, *LABELS[3:], 0])
    weight = jnp.array([1.0, 1, 1, 0, 0, 1, 1, 1, 0])
    strategy, model, queries = MADE[cls](ways=4), eqx.nn.Identity(), jnp.asarray(points(5, 1))
    expected = logits_of(strategy, model, (x, y), queries)
    found = logits_of(strategy, model, (padded, labels, weight), queries)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@each
def test_a_label_without_a_class_gives_no_plausible_classifier(cls):
    support = jnp.asarray(points(2), jnp.float32), jnp.array([0, 2])
    assert np.isnan(logits_of(MADE[cls](ways=2), eqx.nn.Identity(), support, support[0])).all()


def blobs(first: int, last: int, classes: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a point for each class from `first` on."""
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((classes, 1, 4)) + rng.standard_normal((classes, 20, 4))
    x = x[first:last].astype(np.float32)
    return x.reshape(-1, 4), np.repeat(np.arange(first, last), 20)


@each
def test_the_outer_step_is_that_of_plain_jax(cls):
    source = em.tasks.Minibatches(*blobs(0, 5), 6)
    tasks = jax.vmap(source.sample)(jax.random.split(KEY, 2))
    strategy = MADE[cls](classes=5, features=3)
    state = strategy.init(body())

    @eqx.filter_jit
    def step(params):
        """Of both minibatches; by the first step the head of zeros has become another."""
        model, head = params
        x, y = tasks.query[0].reshape(-1, 4), tasks.query[1].reshape(-1)

        def mean_loss(params):
            model, head = params
            f = jax.vmap(model)(x)
            if cls is em.BaselinePlusPlus:
                f, w = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (f, head.weight))
                logits = SCALE * f @ w.T
            else:
                logits = f @ head.weight.T + head.bias[None]
            log_p = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
            return -jnp.mean(log_p[jnp.arange(12), y])

        loss, grads = eqx.filter_value_and_grad(mean_loss)((model, head))
        return loss, eqx.apply_updates((model, head), jax.tree.map(lambda g: -0.5 * g, grads))

    params = state.model.model, state.model.extra
    for _ in range(2):
        loss, params = step(params)
        state, metrics = strategy.outer_update(state, tasks, key=KEY)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert tree_allclose((state.model.model, state.model.extra), params, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}
    assert not tree_allclose(state.model.model, body())


@pytest.mark.slow
@each
def test_pretraining_helps_classes_that_were_never_seen(cls, tmp_path):
    """The useful directions are hidden in noise; the best checkpoint is by few-shot accuracy."""
    rng = np.random.default_rng(1)

    def hidden(x):
        return np.concatenate([x, 4 * rng.standard_normal((len(x), 12)).astype(np.float32)], axis=1)

    (x, y), (new_x, new_y) = blobs(0, 32, 48), blobs(32, 48, 48)
    source = em.tasks.Minibatches(hidden(x), y, 32)
    episodes = em.tasks.Episodes(hidden(new_x), new_y, ways=5, shots=1, queries=5)
    strategy = eqx.tree_at(
        lambda s: s.optimizer, MADE[cls](classes=32, features=16), optax.adam(1e-2)
    )
    seen = Evaluate(episodes, every=100, num_tasks=60, at_start=True)
    best = Checkpoint(tmp_path, every=100, monitor="eval/accuracy")
    model = eqx.nn.Linear(16, 16, key=KEY)
    trainer = em.Trainer(strategy, meta_batch_size=2, callbacks=[seen, best], summary=False)
    trainer.fit(model, source, 200)
    before, after = (
        em.evaluate(strategy, m, episodes, num_tasks=60, seed=1).mean("accuracy")[-1]
        for m in (model, em.load_best(tmp_path, strategy, model).model)
    )
    assert after > before + 0.1


def directions(offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Features whose direction from `offset` says of which class they are, and whose distance from
    it says nothing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 1, 6)) + 0.4 * rng.standard_normal((12, 20, 6))
    x = x / np.linalg.norm(x, axis=2, keepdims=True) * np.exp(rng.standard_normal((12, 20, 1)))
    return (offset + x).reshape(-1, 6).astype(np.float32), np.repeat(np.arange(12), 20)


def accuracy(strategy, x, y) -> float:
    """Of features as they are: nothing is trained, and the model has no parameters."""
    episodes = em.tasks.Episodes(x, y, ways=5, shots=1, queries=5)
    return em.evaluate(strategy, lambda x: x, episodes, num_tasks=100).mean("accuracy")[-1]


@pytest.mark.slow
def test_normalising_and_centring_matter():
    l2n, cl2n = MADE[em.SimpleShot](), MADE[em.SimpleShot](center=directions(5)[0])
    plain = em.ProtoNet(LOSS, optax.sgd(0.1))
    assert accuracy(l2n, *directions(0)) > accuracy(plain, *directions(0)) + 0.1
    assert accuracy(cl2n, *directions(5)) > accuracy(l2n, *directions(5)) + 0.1
    # With nothing to subtract it is L2N, and the mean may be computed before.
    x, _ = directions(5)
    support, queries = (jnp.asarray(x[::40]), jnp.arange(6)), jnp.asarray(x[1::40])
    of = lambda s: logits_of(s, lambda x: x, support, queries)  # noqa: E731
    np.testing.assert_array_equal(of(MADE[em.SimpleShot](center=jnp.zeros((1, 6)))), of(l2n))
    mean = MADE[em.SimpleShot](center=x.mean(axis=0, keepdims=True))
    np.testing.assert_allclose(of(mean), of(cl2n), rtol=1e-4)


@pytest.mark.slow
def test_a_cosine_does_not_see_the_length_of_features():
    x, y = directions(0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for cls, same in ((em.BaselinePlusPlus, True), (em.Baseline, False)):
        strategy = MADE[cls]()
        assert (abs(accuracy(strategy, x, y) - accuracy(strategy, unit, y)) < 1e-3) == same


@pytest.mark.slow
@each
def test_a_body_that_is_not_learnt_stays(cls):
    """Its head is trained; the body has no gradient and no decay."""
    strategy = MADE[cls](classes=5, features=3, learn=lambda m: ())
    strategy = eqx.tree_at(lambda s: s.optimizer, strategy, optax.adamw(0.1))
    trainer = em.Trainer(strategy, meta_batch_size=1, summary=False)
    state = trainer.fit(body(), em.tasks.Minibatches(*blobs(0, 5), 6), 3)
    assert same_bits(state.model.model, body())
    assert not tree_allclose(state.model.extra, strategy.init(body()).model.extra)


@pytest.mark.slow
def test_minibatches_may_come_from_the_host():
    x, y = blobs(0, 5)

    class Host:
        def __getitem__(self, step):
            rows = np.random.default_rng(step).integers(0, len(x), (2, 6))
            return em.Task((), (x[rows], y[rows].astype(np.int32)))

    strategy = MADE[em.SimpleShot](classes=5, features=3)
    state = em.Trainer(strategy, meta_batch_size=2, summary=False).fit(body(), Host(), 2)
    expected = strategy.init(body())
    for step in range(2):
        expected, _ = strategy.outer_update(
            expected, jax.tree.map(jnp.asarray, Host()[step]), key=KEY
        )
    assert tree_allclose(state.model, expected.model)


@pytest.mark.slow
def test_queries_are_normalised_by_the_support_set():
    class Normed(eqx.Module):
        norm: em.nn.SupportNorm

        def __call__(self, x):
            return self.norm(x)

    x, queries = points(6), points(2, 1)
    model = Normed(em.nn.SupportNorm(4))

    def normed(q):
        return (q - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)

    for cls in MADE:
        classifier = MADE[cls](ways=4).inner_adapt(model, support_of(x))
        one_by_one = np.stack([classifier(jnp.asarray(q, jnp.float32)) for q in queries])
        plain = support_of(normed(x))
        expected = logits_of(MADE[cls](ways=4), eqx.nn.Identity(), plain, normed(queries))
        np.testing.assert_allclose(one_by_one, expected, rtol=1e-3, atol=1e-4)


def support_of(x):
    return jnp.asarray(x, jnp.float32), jnp.asarray(LABELS)


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_tasks_and_arguments_are_named():
    minibatches = em.tasks.Minibatches(*blobs(0, 5), 6)
    episodes = em.tasks.Episodes(*blobs(0, 5), 5, 1, 5)

    def fit(strategy, tasks):
        em.Trainer(strategy, meta_batch_size=1, summary=False).fit(body(), tasks, 1)

    sizes = {"classes": 5, "features": 3}
    for cls, make in MADE.items():
        name = cls.__name__
        with pytest.raises(ValueError, match=f"`{name}` trains on minibatches" + THREE_PARTS):
            fit(make(**sizes), episodes)
        with pytest.raises(ValueError, match=f"`{name}` does not know the size" + THREE_PARTS):
            fit(make(classes=5), minibatches)
        with pytest.raises(ValueError, match=rf"`{name}\(features=...\)` is not" + THREE_PARTS):
            fit(make(classes=5, features=4), minibatches)
        with pytest.raises(ValueError, match=rf"`{name}\(classes=...\)`" + THREE_PARTS):
            make(classes=0)
        with pytest.raises(ValueError, match="has no support set" + THREE_PARTS):
            em.evaluate(make(), body(), minibatches)
    with pytest.raises(em.NonFiniteError, match="from 0 to 4"):
        fit(MADE[em.Baseline](classes=3, features=3), minibatches)
    for other in (em.MAML, em.Reptile):
        said = f"`{other.__name__}` adapts to a support set" + THREE_PARTS
        with pytest.raises(ValueError, match=said):
            fit(other(LOSS, inner(), optax.sgd(0.1)), minibatches)
    with pytest.raises(TypeError, match="returned something else" + THREE_PARTS):
        fit(em.SimpleShot(lambda m, b, k: jnp.ones(()), optax.sgd(0.1), **sizes), minibatches)
    for center in (np.zeros((3, 4), np.uint8), "mean", 0.0):
        with pytest.raises(TypeError, match=r"`SimpleShot\(center=...\)`" + THREE_PARTS):
            MADE[em.SimpleShot](center=center)
    with pytest.raises(ValueError, match=r"`BaselinePlusPlus\(scale=...\)`" + THREE_PARTS):
        em.BaselinePlusPlus(LOSS, inner(), optax.sgd(0.1), scale=0)
    adapting = em.InnerLoop(optax.sgd(0.1), 1, adapt=lambda c: c.weight)
    with pytest.raises(ValueError, match="says itself what adapts" + THREE_PARTS):
        em.Baseline(LOSS, adapting, optax.sgd(0.1))
