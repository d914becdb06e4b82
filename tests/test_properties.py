"""What holds whatever hypothesis draws: of episodes, chunks, the container and the inner loop."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import eqxmeta as em
from eqxmeta._checkpoint.save_load import read_manifest
from eqxmeta._loop.pace import Pace, next_stop

from .helpers import tree_allclose

few = settings(max_examples=15, deadline=None, derandomize=True)
many = settings(max_examples=200, deadline=None, derandomize=True)


# Episodes, of one shape so that they are compiled once, from classes of any sizes in any order.


@eqx.filter_jit
def episodes_of(source, seed):
    keys = jax.random.split(jax.random.key(seed), 8)
    return jax.vmap(source.sample)(keys)


@few
@given(st.lists(st.integers(3, 9), min_size=4, max_size=4), st.integers(0, 2**32 - 1), st.data())
def test_episodes(sizes, seed, data):
    # Padded to one length by a last class: as many classes and images, the same program.
    sizes = [*sizes, 60 - sum(sizes)]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(60)
    labels = labels[order]
    images = np.arange(60, dtype=np.float32)[:, None]  # an image is its own index
    task = episodes_of(em.tasks.Episodes(images, labels, ways=2, shots=1, queries=2), seed)
    for i in range(8):
        support, support_y = (np.asarray(x[i]).ravel().astype(int) for x in task.support)
        query, query_y = (np.asarray(x[i]).ravel().astype(int) for x in task.query)
        assert len({*support, *query}) == 2 * (1 + 2)  # distinct, hence disjoint
        assert sorted(support_y) == [0, 1] and sorted(query_y) == [0, 0, 1, 1]
        pairs = zip([*support_y, *query_y], labels[[*support, *query]], strict=True)
        assert len(set(pairs)) == 2  # each label is a class, and the classes differ
        assert len({labels[support[0]], labels[support[1]]}) == 2


# Chunks.


@many
@given(
    st.integers(0, 500),
    st.integers(1, 400),
    st.lists(st.integers(1, 60), max_size=4),
    st.integers(1, 64),
)
def test_every_multiple_of_every_cadence_is_the_end_of_a_chunk(start, length, everys, limit):
    steps, step, stops = start + length, start, []
    while step < steps:
        stop = min(next_stop(step, steps, everys), step + limit)
        assert step < stop <= min(steps, step + limit)
        assert all(
            m >= stop for every in everys for m in range(every, 2 * steps, every) if m > step
        )
        step = stop
        stops.append(stop)
    wanted = {m for every in everys for m in range(every, steps + 1, every) if m > start}
    assert wanted <= set(stops) and stops[-1] == steps
    # And never more stops than are needed.
    cuts = sorted({start, steps} | wanted)
    assert len(stops) == sum(-(-(b - a) // limit) for a, b in itertools.pairwise(cuts))


@many
@given(
    st.one_of(st.just("auto"), st.integers(1, 3000)),
    st.integers(1, 2000),
    st.lists(st.floats(0, 100), max_size=30),
)
def test_the_pace_keeps_within_its_bounds(limit, capacity, seconds):
    pace = Pace(limit, capacity)
    for taken in seconds:
        before = pace.limit
        pace.measured(before, taken)
        assert 1 <= pace.limit <= min(capacity, 1024)
        assert pace.limit <= 4 * before
        if limit != "auto":
            assert pace.limit == min(limit, capacity, 1024)


# The container.

DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32",
    "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@st.composite
def arrays(draw):
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype.kind == "b":
        data = bytes(byte % 2 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape).copy()  # any bits, NaNs of all kinds too


names = st.text("abc[]'.é", min_size=1, max_size=4)
trees = st.recursive(
    st.one_of(arrays(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(names, inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trees)
def test_trees_round_trip_to_the_bit(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "property.ckpt"
    em.save(path, tree)
    like = jax.tree.map(np.zeros_like, tree)
    loaded = em.load(path, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == wanted.tobytes()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_other_bytes_are_found_out_or_do_no_harm(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "corrupt.ckpt"
    tree = {"a": np.arange(40, dtype=np.float32), "b": [np.ones((3, 3)), np.array(7)]}
    em.save(path, tree, meta={"step": 3})
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data)
    try:
        loaded, meta = em.load(path, tree), read_manifest(path)["meta"]
    except em.CheckpointError:
        return
    assert meta == {"step": 3}
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert np.asarray(got).tobytes() == wanted.tobytes()


# The inner loop, on linear regression: the loss is quadratic, and gradient descent has a formula.


class Weights(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return self.w @ x


STEPS, RATE, EXAMPLES = 6, 0.05, 5
LOOP = em.InnerLoop(optax.sgd(RATE, momentum=0.5), STEPS)


@eqx.filter_jit
def descend(loop, model, data, steps=None, opt_state=None):
    return loop(em.losses.mse, model, data, steps=steps, opt_state=opt_state)


def problem(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(EXAMPLES, 3)), rng.normal(size=(EXAMPLES, 1))
    return rng.normal(size=(1, 3)), x, y


seeds = st.integers(0, 10_000)


@few
@given(seeds)
def test_gradient_descent_is_its_formula(seed):
    # w_K - w* = (I - rate H)^K (w_0 - w*), with H = 2/n X'X and w* the least-squares solution.
    with jax.enable_x64(True):
        w, x, y = problem(seed)
        loop = em.InnerLoop(optax.sgd(RATE), STEPS)
        got = descend(loop, Weights(jnp.asarray(w)), (jnp.asarray(x), jnp.asarray(y))).model.w
        best = np.linalg.lstsq(x, y, rcond=None)[0].T
        shrink = np.eye(3) - RATE * 2 / EXAMPLES * x.T @ x
        wanted = best + (w - best) @ np.linalg.matrix_power(shrink, STEPS)
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@few
@given(seeds, st.permutations(range(EXAMPLES)))
def test_the_order_of_the_examples_does_not_matter(seed, order):
    with jax.enable_x64(True):
        w, x, y = map(jnp.asarray, problem(seed))
        order = jnp.asarray(order)
        one = descend(LOOP, Weights(w), (x, y))
        other = descend(LOOP, Weights(w), (x[order], y[order]))
        assert tree_allclose(one.model, other.model, rtol=1e-9)
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-9)


@few
@given(seeds, st.sampled_from([0, 1, 4]))
def test_steps_in_two_parts_are_the_steps_in_one(seed, first):
    with jax.enable_x64(True):
        w, x, y = map(jnp.asarray, problem(seed))
        whole = descend(LOOP, Weights(w), (x, y))
        part = descend(LOOP, Weights(w), (x, y), steps=first)
        rest = descend(LOOP, part.model, (x, y), steps=STEPS - first, opt_state=part.opt_state)
        assert tree_allclose(rest.model, whole.model, rtol=1e-12)
        assert tree_allclose(rest.opt_state, whole.opt_state, rtol=1e-12)
        losses = np.concatenate([part.losses, rest.losses])
        np.testing.assert_allclose(losses, whole.losses, rtol=1e-12)
