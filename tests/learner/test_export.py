"""A learner as a file: what it predicts, against the learner, also without the model's code."""

import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxmeta as em

from .test_learner import FORMAT, LOSS, MAML, PROTOTYPES, Flat

pytestmark = pytest.mark.usefixtures("as_users_run_it")

RNG = np.random.default_rng(0)
PHOTOS = {
    "Avocado": [RNG.integers(0, 256, (3, 4, 4), np.uint8) for _ in range(3)],
    "Kiwi": [RNG.integers(0, 256, (3, 4, 4), np.uint8)],
}
NEW = RNG.integers(0, 256, (3, 4, 4), np.uint8)


def learner(strategy=PROTOTYPES, **options):
    return em.Learner(strategy, strategy.init(Flat(3, **options)).model, images=FORMAT)


@pytest.mark.parametrize(
    "made",
    [
        learner(),
        pytest.param(learner(MAML), marks=pytest.mark.slow),
        pytest.param(learner(norm=em.nn.SupportNorm(3)), marks=pytest.mark.slow),
        pytest.param(learner(em.R2D2(LOSS, optax.sgd(0.1))), marks=pytest.mark.slow),
    ],
    ids=["ProtoNet", "MAML", "SupportNorm", "R2D2"],
)
def test_the_file_predicts_what_the_learner_does(made, tmp_path):
    em.export(tmp_path / "learner.eqx", made, ways=3, shots=2)  # room for more than is given
    loaded = em.load_exported(tmp_path / "learner.eqx")
    expected, found = (x.adapt(PHOTOS)(NEW) for x in (made, loaded))
    assert [name for name, _ in found] == [name for name, _ in expected]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], atol=1e-5)
    assert (loaded.ways, loaded.shots, loaded.format) == (3, 2, FORMAT)
    told = em.inspect(tmp_path / "learner.eqx")["meta"]
    assert told["format"]["mode"] == "RGB" and "cuda" in told["platforms"]


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"`export`(.|\n)*no flatbuffers(.|\n)*eqxmeta\[export\]"):
        em.export(tmp_path / "learner.eqx", learner(), ways=3, shots=2)


DEPLOYED = """
import sys
import numpy as np
import eqxmeta as em

classifier = em.load_exported(sys.argv[1]).adapt({"a": [np.zeros((3, 4, 4), np.uint8)],
                                                  "b": [np.full((3, 4, 4), 255, np.uint8)]})
print(classifier(np.full((3, 4, 4), 200, np.uint8))[0][0])
"""


@pytest.mark.slow
def test_another_process_that_does_not_know_the_model(tmp_path):
    em.export(tmp_path / "learner.eqx", learner(), ways=2, shots=1)
    command = [sys.executable, "-c", DEPLOYED, str(tmp_path / "learner.eqx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "b", done.stderr


def test_too_many_classes_or_photographs(tmp_path):
    with pytest.raises(ValueError, match="more than the model has outputs"):
        em.export(tmp_path / "x", learner(MAML), ways=4, shots=1)
    em.export(tmp_path / "x", learner(), ways=2, shots=1)
    with pytest.raises(ValueError, match="4 photographs of 2 classes"):
        em.load_exported(tmp_path / "x").adapt(PHOTOS)


def test_a_strategy_without_weights_is_refused(tmp_path):
    class Nearest(em.GradientStrategy):
        """Of all examples, be they padding or not."""

        loss: em.Loss
        optimizer: optax.GradientTransformation

        def unadapted(self, model):
            return None

        def inner_adapt(self, model, support, *, key=None):
            return jax.tree.map(lambda p: p + jax.numpy.mean(support[0]), model)

    with pytest.raises(ValueError, match="does not take weights"):
        em.export(tmp_path / "x", learner(Nearest(LOSS, optax.sgd(0.1))), ways=2, shots=1)
    assert not list(tmp_path.iterdir())


def test_another_file_and_a_damaged_one(tmp_path):
    em.save(tmp_path / "model", eqx.nn.Linear(1, 1, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="not an exported learner"):
        em.load_exported(tmp_path / "model")
    em.export(tmp_path / "x", learner(), ways=2, shots=1)
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:3000] + b"\x00\x01" + whole[3002:])
    with pytest.raises(em.CheckpointCorrupt):
        em.load_exported(tmp_path / "x")
