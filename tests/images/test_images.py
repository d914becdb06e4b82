"""Labelled images: parts by class, and what a new image has to be."""

import numpy as np
import pytest

import eqxmeta as em

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def images_of(sizes, **how):
    """Image `i` has all pixels `i`; class `c` is called `class<c>`."""
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    pixels = np.broadcast_to(np.arange(len(labels))[:, None, None, None], (len(labels), 3, 2, 4))
    names = tuple(f"class{c:02}" for c in range(len(sizes)))
    return em.data.Images(pixels.astype(np.uint8), labels, names, **how)


def by_name(images):
    """Which images each class has."""
    return {
        name: images.images[images.labels == c, 0, 0, 0].tolist()
        for c, name in enumerate(images.class_names)
    }


@pytest.mark.parametrize(
    ("fractions", "sizes"),
    [
        ((0.7, 0.15, 0.15), [45, 10, 10]),  # 45.5, 9.75, 9.75
        ((0.5, 0.5), [33, 32]),
        ((1,), [65]),
        ((0.97, 0.03), [63, 2]),
    ],
)
def test_parts_share_no_class_and_lose_none(fractions, sizes):
    images = images_of([1 + c % 4 for c in range(65)], size=2, mode="RGB", from_files=True)
    parts = images.split(*fractions, seed=3)
    assert [len(part.class_names) for part in parts] == sizes
    together = {}
    for part in parts:
        assert not together.keys() & set(part.class_names)
        together |= by_name(part)
        assert list(part.class_names) == sorted(part.class_names)
        assert part.labels.dtype == np.int32 and (part.size, part.mode) == (2, "RGB")
    assert together == by_name(images)


def test_a_seed_is_a_split():
    def names(images, seed):
        return [part.class_names for part in images.split(0.5, 0.5, seed=seed)]

    first = names(images_of([2] * 10), 0)
    assert first == names(images_of([5] * 10), 0)  # whatever the images
    assert len({str(names(images_of([2] * 10), seed)) for seed in range(5)}) == 5
    # numpy.random.RandomState(0).permutation(10), by hand: 2 8 4 9 1 | 6 7 3 0 5
    assert first[0] == ("class01", "class02", "class04", "class08", "class09")


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ((), "add up to 1"),
        ((0.5, 0.4), "add up to 1"),
        ((1.5, -0.5), "positive"),
        ((0.9, 0.05, 0.05), "5 classes, of which 5, 0, 0 in the parts"),
    ],
)
def test_fractions_that_make_no_parts(fractions, said):
    with pytest.raises(ValueError, match=rf"(?s)`split\(\.\.\.\)`.*\nReceived.*{said}"):
        images_of([2] * 5).split(*fractions)


def test_small_classes_are_left_out():
    images = images_of([1, 3, 2, 3])
    assert by_name(images.at_least(3)) == {"class01": [1, 2, 3], "class03": [6, 7, 8]}
    with pytest.raises(ValueError, match=r"leaves no class.*\nReceived: 4, and 3 in the largest"):
        images.at_least(4)


def test_what_is_said_of_them():
    read = images_of([2, 3], size=2, mode="RGB", from_files=True)
    assert repr(read) == (
        "Images(5 images [3, 2, 4] of uint8, 2 classes; size=2, mode='RGB', pixels / 255)"
    )
    assert repr(images_of([2])) == "Images(2 images [3, 2, 4] of uint8, 1 classes)"
    assert read.format == em.data.ImageFormat((3, 2, 4), 2, "RGB")
