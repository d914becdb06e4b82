import ast
import inspect
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqxmeta.data import Images, random_crop, random_flip
from eqxmeta.tasks import Episodes
from eqxmeta.tasks._distinct import distinct

from ..helpers import tree_allclose

pytestmark = pytest.mark.usefixtures("strict_dtypes")

OMNIGLOT = Path(__file__).parents[3] / "shared" / "data" / "omniglot28.npz"


GROCERIES = ("Avocado", "Kiwi", "Mango", "Banana")


def photographs(sizes, names=GROCERIES):
    """Images of class `c` whose pixels are all `10 * c` to `10 * c + 9`, in random order."""
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    labels = np.random.default_rng(0).permutation(labels)
    pixels = 10 * labels + np.arange(len(labels)) % 10
    images = np.broadcast_to(pixels[:, None, None, None], (len(labels), 3, 2, 2))
    return Images(images.astype(np.uint8), labels, tuple(names[: len(sizes)]))


def coded(sizes, names=None, seed=0):
    """A dataset whose images say what they are, `[class, example]`, in random order."""
    pairs = np.array([(c, e) for c, size in enumerate(sizes) for e in range(size)], np.float32)
    np.random.default_rng(seed).shuffle(pairs)
    names = np.arange(len(sizes)) if names is None else np.asarray(names)
    return pairs, names[pairs[:, 0].astype(int)]


@eqx.filter_jit
def draw(episodes, num_episodes, seed=0):
    return jax.vmap(episodes.sample)(jax.random.split(jax.random.key(seed), num_episodes))


def assert_chi_square(observed, expected):
    """Counts agree with their expectation, to 5 standard deviations of the statistic."""
    observed, expected = np.ravel(observed), np.ravel(np.broadcast_to(expected, observed.shape))
    freedom = observed.size - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert freedom - 5 * np.sqrt(2 * freedom) < statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (4, 4), (7, 1), (60, 2), (2, 2)])
def test_distinct_draws_every_ordered_choice_equally_often(n, k):
    keys = jax.random.split(jax.random.key(n), 60_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: distinct(key, n, k)))(keys))
    codes, observed = np.unique(drawn @ n ** np.arange(k), return_counts=True)
    choices = np.prod([n - i for i in range(k)])
    assert len(codes) == choices
    assert_chi_square(observed, 60_000 / choices)


@pytest.mark.parametrize(("n", "k"), [(33, 33), (40, 32), (100_000, 17), (1, 1)])
def test_distinct_of_many(n, k):
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: distinct(key, n, k)))(keys))
    assert drawn.min() >= 0 and drawn.max() < n
    assert all(len(set(row)) == k for row in drawn)
    # Each place of its own: 5 standard deviations of the mean of a uniform variable.
    assert np.abs(drawn.mean(0) - (n - 1) / 2).max() <= 5 * n / np.sqrt(12 * 300)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_an_episode_has_distinct_classes_and_distinct_examples(data):
    ways, shots, queries = (data.draw(st.integers(1, high)) for high in (4, 3, 4))
    sizes = data.draw(st.lists(st.integers(shots + queries, 12), min_size=ways, max_size=7))
    episodes = Episodes(*coded(sizes), ways, shots, queries)
    key = jax.random.key(data.draw(st.integers(0, 99)))
    task = eqx.filter_jit(episodes.sample)(key)
    (support, support_y), (query, query_y) = jax.tree.map(np.asarray, (task.support, task.query))
    assert support.shape == (ways * shots, 2) and query.shape == (ways * queries, 2)
    assert support_y.dtype == query_y.dtype == np.int32
    assert np.array_equal(np.bincount(support_y), [shots] * ways)
    assert np.array_equal(np.bincount(query_y), [queries] * ways)
    x, y = np.concatenate([support, query]), np.concatenate([support_y, query_y])
    # The same label is the same class, in the support set and in the query set.
    class_of = {label: set(x[y == label, 0]) for label in range(ways)}
    assert all(len(classes) == 1 for classes in class_of.values())
    assert len(set.union(*class_of.values())) == ways
    assert len({tuple(pair) for pair in x}) == len(x)
    assert all(example < sizes[int(c)] for c, example in x)


def test_classes_and_examples_are_uniform():
    sizes = [4, 9, 5, 30, 6]
    task = draw(Episodes(*coded(sizes), ways=3, shots=1, queries=2), 20_000)
    support, query = np.asarray(task.support[0], int), np.asarray(task.query[0], int)
    # [episodes, ways]: ordered triples of classes.
    triples = support[:, :, 0] @ 5 ** np.arange(3)
    codes, observed = np.unique(triples, return_counts=True)
    assert len(codes) == 60
    assert_chi_square(observed, 20_000 / 60)
    for examples in (support, query):
        for c, size in enumerate(sizes):
            observed = np.bincount(examples[examples[..., 0] == c, 1], minlength=size)
            assert len(observed) == size
            # Queries of one episode exclude each other, which only narrows the statistic.
            assert ((observed - observed.mean()) ** 2 / observed.mean()).sum() < 3 * size + 10


def test_one_huge_class_among_small_ones():
    sizes = [100_000] + [10] * 20
    task = draw(Episodes(*coded(sizes), ways=21, shots=3, queries=7), 200)
    x = np.concatenate([task.support[0], task.query[0]], axis=1)
    huge = x[x[..., 0] == 0, 1].reshape(200, 10)
    assert all(len(set(row)) == 10 for row in huge)
    assert huge.mean() == pytest.approx(50_000, rel=0.05)
    assert np.median(huge) == pytest.approx(50_000, rel=0.08)
    small = x[x[..., 0] == 7, 1].reshape(200, 10)
    assert all(set(row) == set(range(10)) for row in small)


@pytest.mark.parametrize(
    "names", [[-7, 3, 10**9], ["b", "a", "ç"], np.array([0, 200, 9], np.uint8)]
)
def test_labels_are_names_of_any_kind(names):
    episodes = Episodes(*coded([3, 4, 5], names), ways=3, shots=2, queries=1)
    task = draw(episodes, 20)
    assert set(np.unique(task.support[0][..., 0])) == {0, 1, 2}
    for x, y in zip(*task.query, strict=True):
        assert len({(int(c), int(label)) for c, label in zip(x[:, 0], y, strict=True)}) == 3


def test_uint8_stays_on_the_device_and_becomes_floats_in_the_episode():
    images = np.linspace(0, 255, 48).astype(np.uint8).reshape(12, 2, 2)
    episodes = Episodes(images, np.repeat(np.arange(4), 3), ways=4, shots=1, queries=2)
    assert episodes.images.dtype == jnp.uint8
    task = draw(episodes, 1)
    x = np.concatenate([task.support[0][0], task.query[0][0]])
    assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1
    assert {image.tobytes() for image in np.rint(255 * x).astype(np.uint8)} == {
        image.tobytes() for image in images
    }


@pytest.mark.slow
def test_floats_are_taken_as_they_are():
    images = jnp.linspace(-300, 300, 8).astype(jnp.bfloat16)
    task = Episodes(images, [0, 0, 0, 0, 1, 1, 1, 1], 2, 2, 2).sample(jax.random.key(0))
    x = jnp.concatenate([task.support[0], task.query[0]])
    assert tree_allclose(jnp.sort(x), images, rtol=0, atol=0)


def test_default_float_dtype_is_followed(x64):
    episodes = Episodes(np.full((4, 3), 51, np.uint8), [0, 0, 1, 1], 2, 1, 1)
    x, y = episodes.sample(jax.random.key(0)).query
    assert x.dtype == jnp.float64 and y.dtype == jnp.int32
    np.testing.assert_array_equal(x, np.full((2, 3), 0.2))


def test_the_data_are_arguments_of_the_compiled_program():
    episodes = Episodes(*coded([5] * 6), ways=2, shots=1, queries=1)
    assert len(jax.tree.leaves(episodes)) == 4
    jaxpr = jax.make_jaxpr(lambda episodes, key: episodes.sample(key))(episodes, jax.random.key(0))
    assert all(np.size(const) < 12 for const in jaxpr.consts)


def test_the_same_key_gives_the_same_episode_inside_and_outside_of_loops():
    episodes = Episodes(*coded([5, 6, 7]), ways=2, shots=1, queries=3)
    keys = jax.random.split(jax.random.key(1), 4)
    sample = eqx.filter_jit(episodes.sample)
    singly = [sample(key) for key in keys]

    @eqx.filter_jit
    def looped(episodes):
        def body(i, x):
            return x.at[i].set(episodes.sample(keys[i]).query[0])

        return jax.lax.fori_loop(0, 4, body, jnp.zeros((4, 6, 2)))

    assert tree_allclose(looped(episodes), jnp.stack([task.query[0] for task in singly]))
    batched = jax.vmap(episodes.sample)(keys)
    assert tree_allclose(batched, jax.tree.map(lambda *x: jnp.stack(x), *singly))


@pytest.mark.parametrize("rotations", [False, True])
def test_an_episode_knows_its_classes_by_name(rotations):
    images = photographs([4, 3, 5, 3])
    episodes = Episodes(images, ways=3, shots=1, queries=2, rotations=rotations)
    turned = tuple(f"{name}, {turn}°" for turn in (90, 180, 270) for name in GROCERIES)
    assert episodes.names == GROCERIES + (turned if rotations else ())
    keys = jax.random.split(jax.random.key(0), 40)
    classes = np.asarray(eqx.filter_jit(lambda e, k: jax.vmap(e.classes)(k))(episodes, keys))
    task = draw(episodes, 40)
    shown, asked = (
        np.rint(255 * np.asarray(x)[..., 0, 0, 0]).astype(int) // 10
        for x in (task.support[0], task.query[0])
    )
    assert np.array_equal(classes % 4, shown)  # by what the pixels say
    assert np.array_equal(np.repeat(classes % 4, 2, axis=1), asked)
    assert (classes >= 4).any() == rotations
    # The same tasks as from arrays, whose names are the labels.
    plain = Episodes(*images, ways=3, shots=1, queries=2, rotations=rotations)
    assert plain.names[:4] == ("0", "1", "2", "3")
    assert tree_allclose(draw(plain, 5), draw(episodes, 5), rtol=0, atol=0)


def test_names_of_which_a_class_has_no_images():
    images = photographs([3, 3, 3])
    kept = images.labels != 1
    some = Images(images.images[kept], images.labels[kept], images.class_names)
    assert Episodes(some, ways=2, shots=1, queries=1).names == ("Avocado", "Mango")


def test_classes_that_are_too_small_are_told_by_name():
    with pytest.raises(ValueError, match=r"class 'Avocado' has 1 image, 'Mango' has 2 images\n"):
        Episodes(photographs([1, 5, 2]), ways=2, shots=1, queries=2)
    episodes = Episodes(photographs([1, 5, 2]).at_least(2), ways=2, shots=1, queries=1)
    assert episodes.names == ("Kiwi", "Mango")
    with pytest.raises(TypeError, match=r"(?s)`labels` is missing.*Episodes\(images, ways=5"):
        Episodes(np.zeros((4, 2)), ways=2, shots=1, queries=1)


GOOD = {
    "images": np.zeros((6, 2)),
    "labels": [3, 3, 3, 8, 8, 8],
    "ways": 2,
    "shots": 1,
    "queries": 2,
}


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"images": np.float32(1)}, ValueError, r"`images`.*shape \(\)"),
        ({"images": np.zeros((0, 2)), "labels": []}, ValueError, r"no examples.*\(0, 2\)"),
        ({"images": [[1.0], [1.0, 2.0]]}, ValueError, "`images` is not an array.*one shape"),
        ({"images": np.zeros((6, 2), np.int32)}, TypeError, "`images`.*int32.*uint8"),
        ({"images": np.zeros((5, 2))}, ValueError, r"`labels`.*\(6,\).*5 images"),
        ({"labels": np.zeros((6, 1), int)}, ValueError, r"`labels`.*\(6, 1\)"),
        ({"labels": np.zeros(6)}, TypeError, "`labels`.*float64"),
        ({"ways": 3}, ValueError, "`labels`.*`ways`.*2 classes.*ways=3"),
        ({"queries": 3}, ValueError, "2 of 2 .*class 3 has 3 images, 8 has 3.*at least 4 ex"),
        ({"labels": [3, 3, 3, 3, 8, 8]}, ValueError, "1 of 2.*class 8 has 2 images.*at least 3"),
        (
            {"labels": list("aaabbc"), "ways": 1},
            ValueError,
            "'b' has 2 .*, 'c' has 1 image.*at least 3",
        ),
        ({"ways": 0}, ValueError, "`ways`"),
        ({"shots": True}, TypeError, "`shots`"),
        ({"queries": -2}, ValueError, "`queries`"),
    ],
)
def test_wrong_arguments_are_named(changed, error, said):
    Episodes(**GOOD)
    with pytest.raises(error, match=f"(?s){said}") as caught:
        Episodes(**(GOOD | changed))
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)


def squares(sizes, side=5, channels=None):
    """Images of uint8 that have no symmetry, all different, and their labels."""
    shape = (side, side) if channels is None else (channels, side, side)
    images = np.random.default_rng(0).integers(0, 256, (sum(sizes), *shape), np.uint8)
    return images, np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("channels", [None, 1])
def test_rotations_are_what_appended_turned_images_would_be(channels):
    images, labels = squares([4, 6, 5], channels=channels)
    turned = [np.rot90(images, turn, axes=(-2, -1)) for turn in range(4)]
    appended = [labels + 3 * turn for turn in range(4)]
    expected = Episodes(np.concatenate(turned), np.concatenate(appended), 7, 1, 3)
    episodes = Episodes(images, labels, 7, 1, 3, rotations=True)
    assert episodes.images.shape == images.shape  # and no four times the memory
    assert tree_allclose(draw(episodes, 50), draw(expected, 50), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"(?s)12 classes.*ways=13"):
        Episodes(images, labels, 13, 1, 3, rotations=True)


def test_turns_of_one_class_are_distinct_classes_and_uniform():
    images, labels = squares([3, 3])
    task = draw(Episodes(images, labels, 2, 1, 2, rotations=True), 4000)
    which = {}
    for turn in range(4):
        for image, label in zip(np.rot90(images, turn, axes=(1, 2)), labels, strict=True):
            which[image.tobytes()] = 2 * turn + int(label)
    support, query = (
        np.rint(255 * np.asarray(x)).astype(np.uint8) for x in (task.support[0], task.query[0])
    )
    first = np.array([[which[image.tobytes()] for image in episode] for episode in support])
    # A label means one turn of one class, in the query set too.
    again = np.array([[which[image.tobytes()] for image in episode] for episode in query])
    assert np.array_equal(np.repeat(first, 2, axis=1), again)
    codes, observed = np.unique(first @ [1, 8], return_counts=True)
    assert len(codes) == 8 * 7
    assert_chi_square(observed, 4000 / 56)


def crop_offsets(padded, image, original):
    """The shifts at which `image` is a window of `original` with a border of `padded` zeros."""
    border = np.pad(original, ((0, 0), (padded, padded), (padded, padded)))
    side = image.shape[-1]
    shifts = range(2 * padded + 1)
    found = [(i, j) for i in shifts for j in shifts]
    return [(i, j) for i, j in found if (border[:, i : i + side, j : j + side] == image).all()]


def test_augmented_examples_are_flipped_and_moved_one_by_one():
    images = np.random.default_rng(0).uniform(0.1, 1, (8, 3, 6, 6)).astype(np.float32)
    labels = np.repeat([0, 1], 4)
    plain = draw(Episodes(images, labels, 2, 1, 3), 250)
    augment = [random_crop(padding=1), random_flip]
    task = draw(Episodes(images, labels, 2, 1, 3, augment=augment), 250)
    shifts, mirrored = np.zeros((3, 3), int), 0
    for (x, y), (before, y_before) in ((task.support, plain.support), (task.query, plain.query)):
        assert np.array_equal(y, y_before)  # the same examples as without
        x, before = (np.asarray(images).reshape(-1, 3, 6, 6) for images in (x, before))
        for image, original in zip(x, before, strict=True):
            straight = crop_offsets(1, image, original)
            turned = crop_offsets(1, image[..., ::-1], original)
            ((shift,),) = [found for found in (straight, turned) if found]
            shifts[shift] += 1
            mirrored += bool(turned)
    assert_chi_square(shifts, 2000 / 9)
    assert abs(mirrored - 1000) < 5 * np.sqrt(2000 / 4)


def test_an_augmentation_gets_a_key_for_each_example_and_floats():
    def noise(image, *, key):
        assert jnp.issubdtype(image.dtype, jnp.floating)
        return image + jax.random.normal(key, image.shape, image.dtype)

    images = np.zeros((9, 2, 2), np.uint8)
    task = draw(Episodes(images, np.repeat(np.arange(3), 3), 3, 1, 2, augment=noise), 5)
    x = np.concatenate([task.support[0], task.query[0]], axis=1).reshape(-1)
    assert len(np.unique(x)) == 5 * 9 * 4


def test_the_support_set_alone_is_augmented_after_both_are():
    images, labels = coded([3, 3, 3])
    options = {"ways": 2, "shots": 1, "queries": 2}

    def noise(image, *, key):
        return image + jax.random.uniform(key, image.shape)

    def negative(image, *, key):
        return -image

    plain = draw(Episodes(images, labels, **options), 5)
    alone = draw(Episodes(images, labels, **options, augment_support=negative), 5)
    assert np.array_equal(alone.support[0], -plain.support[0])
    assert np.array_equal(alone.query[0], plain.query[0])
    assert np.array_equal(alone.support[1], plain.support[1])
    noisy = draw(Episodes(images, labels, **options, augment=noise), 5)
    both = draw(Episodes(images, labels, **options, augment=noise, augment_support=negative), 5)
    assert np.array_equal(both.support[0], -noisy.support[0])
    assert np.array_equal(both.query[0], noisy.query[0])


@pytest.mark.parametrize(
    ("images", "options", "error", "said"),
    [
        (np.zeros((6, 4, 5)), {"rotations": True}, ValueError, r"`rotations`.*\(4, 5\).*square"),
        (np.zeros((6, 4)), {"rotations": True}, ValueError, r"`rotations`.*\(4,\)"),
        (np.zeros((6, 8, 8, 3)), {"rotations": True}, ValueError, "channels first"),
        (np.zeros((6, 4, 4)), {"augment": lambda x, *, key: x[1:]}, ValueError, "something else"),
        (np.zeros((6, 4, 4)), {"augment": lambda x, *, key: x > 0}, ValueError, "bool"),
        (np.zeros((6, 4, 4)), {"augment": [3]}, TypeError, "`augment` is not a function"),
        (np.zeros((6, 4, 4)), {"augment": 3}, TypeError, "`augment` is not a function"),
        (np.zeros((6, 4, 4)), {"augment_support": 3}, TypeError, "`augment_support` is not a"),
        (np.zeros((6, 4, 4)), {"rotations": "yes"}, TypeError, "`rotations` is not.*'yes'"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_rotations_and_augmentations(images, options, error, said):
    with pytest.raises(error, match=f"(?s){said}") as caught:
        Episodes(images, [0, 0, 0, 1, 1, 1], 2, 1, 2, **options)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)
    assert Episodes(**GOOD, augment=None).augment == ()
    for padding, wrong in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(wrong, match="padding"):
            random_crop(padding)


def centroid_accuracy(task, ways):
    """Nearest class mean in pixels, in NumPy: what can be had without learning anything."""
    (x, y), (query, query_y) = jax.tree.map(np.asarray, (task.support, task.query))
    x, query = x.reshape(len(x), -1), query.reshape(len(query), -1)
    means = np.stack([x[y == label].mean(0) for label in range(ways)])
    distance = ((query[:, None] - means[None]) ** 2).sum(-1)
    return np.mean(distance.argmin(1) == query_y)


@pytest.mark.skipif(not OMNIGLOT.exists(), reason=f"no {OMNIGLOT.name} beside the repository")
@pytest.mark.parametrize(
    ("ways", "shots", "floor", "ci95"),
    [
        (5, 1, 0.408, 0.011),
        pytest.param(5, 5, 0.679, 0.011, marks=pytest.mark.slow),
        pytest.param(20, 1, 0.22, 0.005, marks=pytest.mark.slow),
    ],
)
def test_pixel_centroid_floor_of_omniglot(ways, shots, floor, ci95):
    with np.load(OMNIGLOT) as file:
        images = file["images"][file["vinyals"] == "test"]
    labels = np.repeat(np.arange(len(images)), 20)
    episodes = Episodes(images.reshape(-1, 28, 28), labels, ways, shots, queries=15)
    sample = eqx.filter_jit(episodes.sample)
    keys = jax.random.split(jax.random.key(0), 400)
    accuracy = [centroid_accuracy(sample(key), ways) for key in keys]
    own_ci95 = 1.96 * np.std(accuracy) / np.sqrt(len(keys))
    # Two estimates of the same quantity: their difference is wider than either.
    assert abs(np.mean(accuracy) - floor) < 1.3 * np.hypot(ci95, own_ci95)


def test_the_signatures_for_type_checkers_are_those_of_the_call():
    """Of `Episodes(*data, ways=5, ...)` mypy does not know how many arguments `*data` is."""
    tree = ast.parse(Path(inspect.getfile(Episodes)).read_text())
    found = [x for x in ast.walk(tree) if getattr(x, "name", "") == "__init__"]
    *overloads, real = [x.args for x in found if isinstance(x, ast.FunctionDef)]
    by_position = [[arg.arg for arg in arguments.args] for arguments in overloads]
    pair = ["self", "images", "labels"]
    assert by_position == [pair[:2], pair, [arg.arg for arg in real.args]]
    names = [arg.arg for arg in real.args + real.kwonlyargs]
    for arguments in overloads:
        taken = [arg.arg for arg in arguments.args + arguments.kwonlyargs]
        assert taken == [x for x in names if x != "labels" or x in taken]
        given = [ast.unparse(x) for x in arguments.kw_defaults if x is not None]
        assert given == [ast.unparse(x) for x in real.kw_defaults if x is not None]
