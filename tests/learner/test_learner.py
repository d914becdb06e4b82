"""New classes from a few photographs: what is predicted, against files read and models adapted by
hand."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from PIL import Image

import eqxmeta as em

pytestmark = pytest.mark.usefixtures("as_users_run_it")


class Flat(eqx.Module):
    """`[3, 4, 4] -> [outputs]`."""

    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    norm: em.nn.SupportNorm | em.nn.BatchNorm | None

    def __init__(self, outputs, *, rate=0.0, norm=None, key=None):
        self.linear = eqx.nn.Linear(48, outputs, key=jax.random.key(0) if key is None else key)
        self.dropout = eqx.nn.Dropout(rate)
        self.norm = norm

    def __call__(self, image: Array, *, key=None) -> Array:
        image = image if self.norm is None else self.norm(image)
        return self.linear(self.dropout(image.ravel(), key=key, inference=key is None or None))


FORMAT = em.data.ImageFormat((3, 4, 4), size=4, mode="RGB")
LOSS = em.losses.cross_entropy
PROTOTYPES = em.ProtoNet(LOSS, optax.adam(1e-3))
MAML = em.MAML(LOSS, em.InnerLoop(optax.sgd(0.5), steps=2), optax.adam(1e-3))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two of avocados, of which one lies on its side, three of kiwis, one new; larger than what is
    trained on, of several kinds."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    sideways = Image.Exif()
    sideways[0x0112] = 6  # by a quarter
    for name, shape, options in (
        ("avocado1.png", (9, 12, 3), {}),
        ("avocado2.png", (12, 9, 3), {"exif": sideways}),
        ("kiwi1.png", (7, 7), {}),
        ("kiwi2.png", (8, 6, 3), {}),
        ("kiwi3.jpg", (20, 16, 3), {}),
        ("new.png", (10, 10, 4), {}),
    ):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name, **options)
    return folder


def by_hand(file):
    """As a user would read it with Pillow alone."""
    with Image.open(file) as image:
        if file.name == "avocado2.png":
            image = image.rotate(-90, expand=True)
        if image.mode == "RGBA":
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
        image = image.convert("RGB").resize((4, 4), Image.Resampling.BILINEAR)
        return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def names_and_files(folder):
    kiwis = [folder / f"kiwi{n}" for n in ("1.png", "2.png", "3.jpg")]
    return {"Avocado": [folder / "avocado1.png", str(folder / "avocado2.png")], "Kiwi": kiwis}


def support_by_hand(folder):
    files = [file for files in names_and_files(folder).values() for file in files]
    x = np.stack([by_hand(folder / re.split("/", str(file))[-1]) for file in files])
    return x, np.array([0, 0, 1, 1, 1], np.int32)


def softmax(logits):
    shares = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return shares / shares.sum()


def assert_predicts(found, expected, names=("Avocado", "Kiwi")):
    """`found` are these probabilities, the largest first."""
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert sum(p for _, p in found) == pytest.approx(1)
    assert dict(found) == pytest.approx(dict(zip(names, expected, strict=True)), abs=2e-5)


def test_a_photograph_is_read_as_training_read_its_images(photographs):
    (photographs / "a").mkdir(exist_ok=True)
    for file in photographs.glob("*.*"):
        found = em.data.read_image(file, like=FORMAT)
        assert found.dtype == np.float32 and np.abs(found - by_hand(file)).max() <= 1e-6
        (photographs / "a" / file.name).write_bytes(file.read_bytes())
    images = em.data.from_folder(photographs, ["a"], size=4, mode="RGB")
    assert images.format == FORMAT
    # An episode of them has these very numbers.
    drawn = em.tasks.Episodes(images, ways=1, shots=3, queries=3).sample(jax.random.key(0))
    seen = np.concatenate([drawn.support[0], drawn.query[0]])
    for file in photographs.glob("*.*"):
        x = em.data.read_image(str(file), like=images)
        assert (np.abs(seen - x).max((1, 2, 3)) < 1e-7).any()


def test_prototypes_of_photographs(photographs):
    """Unequal numbers of them; each class mean and distance in NumPy."""
    model = Flat(6)
    learner = em.Learner(PROTOTYPES, model, images=FORMAT)
    classifier = learner.adapt(names_and_files(photographs))
    x, y = support_by_hand(photographs)
    weight, bias = np.asarray(model.linear.weight), np.asarray(model.linear.bias)
    features = x.reshape(5, -1) @ weight.T + bias
    means = np.stack([features[y == c].mean(0) for c in (0, 1)])
    new = by_hand(photographs / "new.png").ravel() @ weight.T + bias
    expected = softmax(-((new - means) ** 2).sum(1))
    assert_predicts(classifier(photographs / "new.png"), expected)
    assert classifier.names == ("Avocado", "Kiwi")


def test_a_model_with_more_outputs_than_classes(photographs):
    """MAML by gradient descent written out; the outputs that are left over take no part."""
    model = Flat(4)
    classifier = em.Learner(MAML, model, images=FORMAT).adapt(names_and_files(photographs))
    x, y = support_by_hand(photographs)
    weight, bias = np.asarray(model.linear.weight), np.asarray(model.linear.bias)
    for _ in range(2):
        logits = x.reshape(5, -1) @ weight.T + bias
        logits[:, 2:] = -np.inf
        error = (np.stack([softmax(row) for row in logits]) - np.eye(4)[y]) / 5
        weight, bias = weight - 0.5 * error.T @ x.reshape(5, -1), bias - 0.5 * error.sum(0)
    new = by_hand(photographs / "new.png")
    expected = softmax((weight @ new.ravel() + bias)[:2])
    assert_predicts(classifier(photographs / "new.png"), expected)
    assert_predicts(classifier(new), expected)  # an array, scaled
    with Image.open(photographs / "new.png") as image:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image).convert("RGB")
        pixels = np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert_predicts(classifier(pixels), expected)  # bytes
    with pytest.raises(ValueError, match=r"(?s)too few outputs.*5 classes, of which it tells 4"):
        em.Learner(MAML, model, images=FORMAT).adapt({name: [new] for name in "abcde"})


@pytest.mark.parametrize("strategy", [PROTOTYPES, MAML], ids=["ProtoNet", "MAML"])
@pytest.mark.slow
def test_dropout_and_statistics_of_the_support_set(photographs, strategy):
    model = Flat(4, rate=0.3, norm=em.nn.SupportNorm(3))
    learner = em.Learner(strategy, model, images=FORMAT)
    first, second = (learner.adapt(names_and_files(photographs)) for _ in range(2))
    new = photographs / "new.png"
    assert first(new) == first(new) == second(new)  # and not by chance: 30 % are dropped
    support = (*map(jnp.asarray, support_by_hand(photographs)), jnp.ones(5))
    adapted = strategy.inner_adapt(model, support, key=jax.random.key(0))
    adapted = em.with_support_statistics(LOSS, adapted, support, key=jax.random.key(0))
    expected = softmax(eqx.nn.inference_mode(adapted)(jnp.asarray(by_hand(new)))[:2])
    assert_predicts(first(new), expected)


def refused(call, error, said):
    with pytest.raises(error, match=f"(?s){said}") as caught:
        call()
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)


def test_what_does_not_classify_is_refused():
    def learner(strategy=PROTOTYPES, model=None, images=FORMAT):
        model = Flat(3) if model is None else model
        return lambda: em.Learner(strategy, model, images=images)

    regression = em.MAML(em.losses.mse, MAML.inner, optax.adam(1e-3))
    refused(learner(regression), ValueError, "cannot adapt to classes.*MAML: Pred.*cross_entropy")
    refused(learner(em.ProtoNet(em.losses.mse, optax.sgd(0.1))), ValueError, "adapt to classes")
    refused(learner(model=Flat(3, norm=em.nn.BatchNorm(3))), ValueError, "BatchNorm.*SupportNorm")
    other = em.data.ImageFormat((3, 5, 5), size=5, mode="RGB")
    refused(learner(images=other), ValueError, "cannot adapt to classes of images.*ProtoNet: ")
    refused(learner(strategy=3), TypeError, r"`Learner\(strategy")
    refused(learner(model=PROTOTYPES.init(Flat(3))), TypeError, r"Learner\(model.*state\.model")
    refused(learner(images=np.zeros((3, 4, 4))), TypeError, r"Learner\(images.*from_folder")


def test_wrong_photographs_are_named(photographs):
    learner = em.Learner(PROTOTYPES, Flat(6), images=FORMAT)
    file, x = photographs / "new.png", np.zeros((3, 4, 4), np.float32)

    def adapt(**given):
        return lambda: learner.adapt({"Avocado": [x], **given})

    refused(lambda: learner.adapt({}), TypeError, "no classes")
    refused(lambda: learner.adapt([file]), TypeError, "no classes")
    refused(adapt(Kiwi=[]), ValueError, r"`photographs\['Kiwi'\]` is empty")
    refused(adapt(Kiwi=file), TypeError, r"`photographs\['Kiwi'\]` is not a list")
    refused(adapt(Kiwi=x), ValueError, r"'Kiwi'.*another shape.*\[4, 4\]")
    refused(adapt(Kiwi=[x.transpose(1, 2, 0)]), ValueError, r"another shape.*\[4, 4, 3\].*moveaxis")
    refused(adapt(Kiwi=[np.zeros((3, 9, 9))]), ValueError, r"\[3, 9, 9\].*pass its path")
    refused(adapt(Kiwi=[x + 200]), ValueError, r"another scale.*200.*\[0, 1\] or uint8")
    refused(adapt(Kiwi=[x - 0.5]), ValueError, "another scale.*-0.5")
    refused(adapt(Kiwi=[x * np.nan]), ValueError, "another scale.*nan")
    refused(adapt(Kiwi=[x.astype(int)]), TypeError, "another scale.*int64")
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        learner.adapt({"Avocado": [photographs / "no.png"]})
    broken = eqx.tree_at(lambda m: m.linear.weight, Flat(6), jnp.full((6, 48), jnp.inf))
    classifier = em.Learner(PROTOTYPES, broken, images=FORMAT).adapt({"a": [x], "b": [x]})
    refused(lambda: classifier(x), ValueError, "predicts NaN")


def test_photographs_that_cannot_be_read_as_the_images_were(photographs):
    def read(like):
        return lambda: em.data.read_image(photographs / "kiwi1.png", like=like)

    refused(read(em.data.ImageFormat((3, 4, 4), mode="RGB")), ValueError,
            "kiwi1.png is not like.*colour, 7 x 7.*colour, 4 x 4.*size=84")  # fmt: skip
    refused(read(em.data.ImageFormat((3, 4, 4), size=4)), ValueError, "grey, 4 x 4.*colour, 4 x 4")
    refused(read("RGB"), TypeError, r"`read_image\(like")
    labels = np.zeros(1, np.int32)
    arrays = em.data.Images(np.zeros((1, 3, 7, 7), np.uint8), labels, ("a",))
    refused(read(arrays), ValueError, "does not say how a file is read.*as an array")
    floats = em.data.Images(np.zeros((1, 3, 7, 7), np.float32), labels, ("a",)).format
    assert floats.scale == 1
    refused(lambda: floats.scaled(np.zeros((3, 7, 7), np.uint8), "x"), TypeError, "uint8.*floats")
    assert floats.scaled(np.full((3, 7, 7), -9.0), "x").max() == -9
