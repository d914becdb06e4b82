"""Ordinary minibatches of labelled arrays."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxmeta._images.images import Images
from eqxmeta.tasks import Minibatches

from .test_episodes import assert_chi_square, coded, draw

pytestmark = pytest.mark.usefixtures("strict_dtypes")
SIZES = [3, 1, 5, 2]


def test_examples_are_drawn_equally_often_with_the_number_of_their_class():
    names = np.array(["oak", "ash", "yew", "elm"])  # class 0 is "ash"
    images, labels = coded(SIZES, names)
    source = Minibatches(images, labels, batch_size=8)
    assert source.num_classes == 4 and source.names == ("ash", "elm", "oak", "yew")
    task = draw(source, 1100)
    assert task.support == ()
    x, y = (np.asarray(part) for part in task.query)
    assert x.shape == (1100, 8, 2) and y.shape == (1100, 8) and y.dtype == np.int32
    assert x.dtype == np.float32
    classes, examples = x.reshape(-1, 2).astype(int).T
    assert [source.names[number] for number in y.ravel()] == names[classes].tolist()
    counts = np.bincount(10 * classes + examples)
    assert_chi_square(counts[counts > 0], 8 * 1100 / sum(SIZES))
    assert (counts > 0).sum() == sum(SIZES)


def test_a_batch_depends_on_its_key_alone():
    source = Minibatches(*coded(SIZES), 8)
    together, sample = draw(source, 3), jax.jit(lambda key: source.sample(key))
    for i, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        alone = sample(key)
        assert np.array_equal(alone.query[0], together.query[0][i])
        assert np.array_equal(alone.query[1], together.query[1][i])
    assert not np.array_equal(together.query[0][0], together.query[0][1])


def test_turned_images_are_classes_of_their_own():
    images = np.random.default_rng(0).integers(0, 255, (6, 1, 3, 3), np.uint8)
    labels = np.repeat([7, 30], 3)
    source = Minibatches(images, labels, 16, rotations=True)
    assert source.num_classes == 8
    task = draw(source, 30)
    seen = set()
    for x, y in zip(*(part.reshape(-1, *part.shape[2:]) for part in task.query), strict=True):
        label, _, turn = source.names[int(y)].partition(", ")
        degrees = int(turn.rstrip("°") or 0)
        pixels = np.round(np.asarray(x) * 255).astype(np.uint8)
        turned = np.rot90(images[labels == int(label)], degrees // 90, axes=(-2, -1))
        assert (turned == pixels).all(axis=(1, 2, 3)).any()
        seen.add(int(y))
    assert seen == set(range(8))


def test_each_example_is_augmented_with_a_key_of_its_own():
    def noise(image, *, key):
        assert jnp.issubdtype(image.dtype, jnp.floating)
        return image + jax.random.normal(key, image.shape, image.dtype)

    source = Minibatches(np.zeros((9, 2, 2), np.uint8), np.arange(9) // 3, 6, augment=noise)
    assert len(np.unique(draw(source, 5).query[0])) == 5 * 6 * 4


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` is too small"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` is not an integer"),
        ({"labels": None}, TypeError, "`labels` is missing"),
        ({"labels": np.zeros(3)}, ValueError, "`labels` does not match"),
        ({"images": np.zeros((4, 2), int)}, TypeError, "`images` has a dtype"),
        ({"rotations": True}, ValueError, "`rotations`"),
        ({"augment": 3}, TypeError, "`augment` is not a function"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_arguments_are_named(wrong, error, said):
    good = {"images": np.zeros((4, 2)), "labels": [0, 0, 1, 1], "batch_size": 2}
    with pytest.raises(error, match=said + r"(.|\n)*\nReceived: (.|\n)+\nExpected: "):
        Minibatches(**good | wrong)


def test_the_signatures_for_type_checkers_are_those_of_the_call():
    """As for `Episodes`."""
    tree = ast.parse(Path(inspect.getfile(Minibatches)).read_text())
    found = [x for x in ast.walk(tree) if getattr(x, "name", "") == "__init__"]
    *overloads, real = [x.args for x in found if isinstance(x, ast.FunctionDef)]
    names = [arg.arg for arg in real.args + real.kwonlyargs]
    of_images, of_arrays = ([arg.arg for arg in x.args + x.kwonlyargs] for x in overloads)
    assert of_arrays == names
    assert of_images == [name for name in names if name != "labels"]


def test_what_the_data_loaders_return_has_names_of_its_own():
    images = Images(np.zeros((3, 1, 2, 2), np.uint8), np.array([1, 0, 1]), ("oak", "yew"))
    assert Minibatches(images, batch_size=2).names == ("oak", "yew")
