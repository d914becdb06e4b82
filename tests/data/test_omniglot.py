"""Omniglot from the compact file: the real one where it is, and a small one of the same format."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxmeta as em
from eqxmeta.data._omniglot_archives import vinyals_split

OMNIGLOT = Path(__file__).parents[3] / "shared" / "data" / "omniglot28.npz"
real = pytest.mark.skipif(not OMNIGLOT.exists(), reason=f"no {OMNIGLOT.name} beside the repository")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def compact():
    with np.load(OMNIGLOT) as file:
        return {name: file[name] for name in file}


@pytest.fixture
def small(tmp_path):
    """Six characters, three drawings of each, whose pixels are all different."""
    images = np.arange(6 * 3 * 4, dtype=np.uint8).reshape(6, 3, 2, 2)
    arrays = {
        "images": images,
        "alphabet": np.array(["A", "A", "A", "B", "B", "B"]),
        "character": np.array([f"character0{i}" for i in (1, 2, 3, 1, 2, 3)]),
        "vinyals": np.array(["train", "val", "train", "test", "train", "val"]),
    }
    np.savez_compressed(tmp_path / "omniglot28.npz", **arrays)
    return tmp_path, arrays


def test_reads_the_file_or_the_folder_that_holds_it(small):
    root, arrays = small
    for path in (root, root / "omniglot28.npz", str(root)):
        data = em.data.omniglot(path, split="train", download=True)  # there is nothing to download
        assert data.class_names == ("A/character01", "A/character03", "B/character02")
        assert data.images.shape == (9, 1, 2, 2) and data.images.dtype == np.uint8
        assert np.array_equal(data.labels, [0, 0, 0, 1, 1, 1, 2, 2, 2])
        assert data.labels.dtype == np.int32
        assert np.array_equal(data.images, arrays["images"][[0, 2, 4]].reshape(9, 1, 2, 2))
    assert em.data.omniglot(root, "test").class_names == ("B/character01",)
    assert repr(data) == "Images(9 images [1, 2, 2] of uint8, 3 classes)"


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_wrong_is_said(small, tmp_path):
    root, arrays = small
    with pytest.raises(FileNotFoundError, match=r"(?s)`root`.*nowhere.*download=True"):
        em.data.omniglot(tmp_path / "nowhere")
    for wrong, known in (
        ({"split": "background"}, "'train', 'val' or 'test'"),
        ({"protocol": "lake"}, "'vinyals' or 'maml'"),
    ):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"(?s)`{name}`.*Expected: {known}"):
            em.data.omniglot(root, **wrong)
    with pytest.raises(ValueError, match=r"(?s)protocol='maml'.*6 characters.*1623"):
        em.data.omniglot(root, protocol="maml")
    for other, said in (
        ({"images": arrays["images"]}, "Vinyals split"),
        ({"images": arrays["images"][0]}, "not Omniglot"),
        ({"other": arrays["images"]}, "not Omniglot"),
        (arrays | {"character": arrays["character"][1:]}, "not Omniglot"),
    ):
        np.savez(root / "other.npz", **other)
        with pytest.raises(ValueError, match=f"(?s){said}.*Received: .*Expected: "):
            em.data.omniglot(root / "other.npz")
    whole = (root / "omniglot28.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[100] ^= 255
    for content in (whole[:-50], bytes(damaged), b"", b"neither"):
        (root / "omniglot28.npz").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            em.data.omniglot(root)


@real
def test_the_rule_of_the_vinyals_split_is_that_of_the_file(compact):
    pairs = enumerate(compact["alphabet"], start=1)
    assert [vinyals_split(number, alphabet) for number, alphabet in pairs] == list(
        compact["vinyals"]
    )


@real
@pytest.mark.parametrize(
    ("protocol", "sizes"), [("vinyals", (1028, 172, 423)), ("maml", (1100, 100, 423))]
)
def test_every_character_is_in_one_split(compact, protocol, sizes):
    pairs = zip(compact["alphabet"], compact["character"], strict=True)
    row = {f"{alphabet}/{character}": i for i, (alphabet, character) in enumerate(pairs)}
    names = []
    for split, size in zip(SPLITS, sizes, strict=True):
        data = em.data.omniglot(OMNIGLOT, split, protocol)
        rows = [row[name] for name in data.class_names]
        assert len(rows) == size and rows == sorted(rows)
        assert np.array_equal(data.images[:, 0].reshape(size, 20, 28, 28), compact["images"][rows])
        assert np.array_equal(data.labels, np.repeat(np.arange(size), 20))
        names += data.class_names
    assert len(set(names)) == len(names) == 1623


PINNED = {"train": "18bc18b65e4ca7af", "val": "a3b8e86ddad1f9da", "test": "fc3b149555efe64d"}


@real
def test_the_maml_split_is_the_same_everywhere_and_for_good():
    digests = {}
    for split in SPLITS:
        names = em.data.omniglot(OMNIGLOT, split, "maml").class_names
        digests[split] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    assert digests == PINNED


def unturned(images):
    """The same bytes for an image and for all its turns."""
    turns = [np.rot90(images, turn, axes=(-2, -1)).reshape(len(images), -1) for turn in range(4)]
    return {min(turned[i].tobytes() for turned in turns) for i in range(len(images))}


@pytest.mark.slow
@real
@pytest.mark.parametrize("protocol", ["vinyals", "maml"])
def test_no_drawing_of_an_episode_is_in_another_split_however_it_is_turned(protocol):
    data = {split: em.data.omniglot(OMNIGLOT, split, protocol) for split in SPLITS}
    drawings = {split: unturned(data[split].images[:, 0]) for split in SPLITS}
    for split, others in (("train", ("val", "test")), ("val", ("test",))):
        assert all(drawings[split].isdisjoint(drawings[other]) for other in others)
    for split in SPLITS:
        episodes = em.tasks.Episodes(
            data[split].images, data[split].labels, 20, 1, 4, rotations=True
        )
        task = jax.vmap(episodes.sample)(jax.random.split(jax.random.key(0), 10))
        x = np.concatenate([task.support[0].reshape(-1, 28, 28), task.query[0].reshape(-1, 28, 28)])
        assert unturned(np.rint(255 * x).astype(np.uint8)) <= drawings[split]


@real
def test_tasks_are_fixed_by_the_seed_of_the_evaluation():
    def fingerprint(model, batch, key):
        x, y = batch
        weights = jnp.linspace(0.5, 1.5, x.size).reshape(x.shape)
        return jnp.sum(x * weights), {"y": jnp.sum(y * jnp.arange(len(y)))}

    class Fixed(em.Strategy):
        loss = staticmethod(fingerprint)

        def init(self, model):
            raise NotImplementedError

        def inner_adapt(self, model, support, *, key=None):
            return support[0].mean()

        def outer_update(self, state, tasks, *, key):
            raise NotImplementedError

    def evaluated(seed, num_tasks=8):
        data = em.data.omniglot(OMNIGLOT, "test")
        tasks = em.tasks.Episodes(data.images, data.labels, 5, 1, 3, rotations=True)
        return em.evaluate(Fixed(), jnp.zeros(1), tasks, num_tasks=num_tasks, seed=seed).values[
            "loss"
        ][:, 0]

    first = evaluated(seed=1)
    assert len(np.unique(first)) == 8
    assert np.array_equal(first, evaluated(seed=1))
    np.testing.assert_allclose(evaluated(seed=1, num_tasks=5), first[:5], rtol=1e-6)
    assert not np.isin(evaluated(seed=2), first).any()
