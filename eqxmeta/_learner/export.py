"""A learner as one file that needs none of its code: adaptation and prediction, compiled by JAX."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._arguments import check_argument, check_int, check_path
from .._checkpoint.save_load import load_below, read_manifest, save
from .._errors import CheckpointCorrupt, explain, need
from .._images.format import ImageFormat
from .._model.predict import predict
from .._strategy.strategy import adapted_model
from .classifier import as_image, ranked
from .learner import Learner, labelled

# What the file is compiled for: a program for each is in it.
PLATFORMS = "cpu", "cuda", "rocm", "tpu"

_KIND = "eqxmeta learner 1"
_TOLERANCE = 1e-3


def export(path: str | os.PathLike[str], learner: Learner, *, ways: int, shots: int) -> None:
    """Write `learner` to one file from which `load_exported` adapts and predicts, without the code
    of the model and the strategy, on CPUs and accelerators (`jax.export`, StableHLO).

    - `ways`, `shots`: the most classes, and the most photographs of all of them together are
      `ways * shots`. Fewer, and not as many of each class, are padded by examples of weight 0.

    The file is checksummed as a checkpoint is, and `eqxmeta.inspect` shows its size, mode, scale
    and inputs. Needs the extra `export` (flatbuffers).

    Raises `TypeError` or `ValueError` for arguments that are not as above, for more ways than the
    model has outputs, and for a strategy or loss that does not take weights `(x, y, weight)`: that
    padding makes no difference is tried before anything is written.
    """
    argument = "export(learner=...)"
    sound, expected = isinstance(learner, Learner), "an `eqxmeta.Learner`"
    check_argument(sound, type(learner), argument, expected, TypeError)
    ways = check_int(ways, "export(ways=...)", minimum=1, what="classes")
    shots = check_int(shots, "export(shots=...)", minimum=1, what="photographs a class")
    path = check_path(path, "export(path=...)")
    need("flatbuffers", "export", "export")
    n, image = ways * shots, learner.format.shape
    outputs = learner.outputs(n)
    if outputs < ways:
        message = "`export(ways=...)` is more than the model has outputs."
        raise ValueError(explain(message, ways, f"{outputs} or fewer"))
    adapt, measure = _functions(learner)
    support = tuple(
        jax.ShapeDtypeStruct((n, *shape), dtype)
        for shape, dtype in ((image, jnp.float32), ((), jnp.int32), ((), jnp.float32))
    )
    _check_weights(learner, adapt, measure, n, ways)
    adapting = _exported(adapt, *support)
    arrays = jax.eval_shape(adapt, *support)
    measuring = _exported(measure, arrays, jax.ShapeDtypeStruct(image, jnp.float32))
    programs = {
        name: np.frombuffer(exported.serialize(), np.uint8)
        for name, exported in (("adapt", adapting), ("predict", measuring))
    }
    meta = {
        "kind": _KIND,
        "ways": ways,
        "shots": shots,
        "format": dataclasses.asdict(learner.format),
        "inputs": ["support images", "support labels", "support weights", "image"],
        "platforms": list(PLATFORMS),
    }
    save(path, programs, meta=meta)


class ExportedLearner:
    """What `load_exported` returns; used as a `Learner` is.

    - `ways`, `shots`: those of `export`. `format`: what an image has to be.
    """

    def __init__(self, programs: Mapping[str, Any], meta: Mapping[str, Any]):
        image = {**meta["format"], "shape": tuple(meta["format"]["shape"])}
        self.format = ImageFormat(**image)
        self.ways = int(meta["ways"])
        self.shots = int(meta["shots"])
        self._adapt, self._predict = (
            jax.jit(jax.export.deserialize(bytearray(np.asarray(programs[name]))).call)
            for name in ("adapt", "predict")
        )

    def __repr__(self) -> str:
        return f"ExportedLearner(ways={self.ways}, shots={self.shots}, {self.format})"

    def adapt(self, photographs: Mapping[str, Sequence[Any]]) -> "ExportedClassifier":
        """As `Learner.adapt`; for at most `ways` classes, and `ways * shots` photographs."""
        names, x, y = labelled(photographs, self.format)
        most = self.ways * self.shots
        if len(names) > self.ways or len(x) > most:
            message = "`adapt(photographs=...)` is more than the file was exported for."
            received = f"{len(x)} photographs of {len(names)} classes"
            expected = (
                f"at most {most} of {self.ways}; `export(path, learner, ways=..., shots=...)`"
            )
            raise ValueError(explain(message, received, expected))
        rest = most - len(x)
        x = np.concatenate([x, np.zeros((rest, *self.format.shape), np.float32)])
        y = np.concatenate([y, np.zeros(rest, np.int32)])
        weight = (np.arange(most) < most - rest).astype(np.float32)
        return ExportedClassifier(names, self._adapt(x.astype(np.float32), y, weight), self)


class ExportedClassifier:
    """Names photographs, as `ExportedLearner.adapt` has made it; called as a `Classifier` is."""

    def __init__(self, names: tuple[str, ...], arrays: Sequence[Array], learner: ExportedLearner):
        self.names = names
        self._arrays = arrays
        self._learner = learner

    def __call__(self, photo: Any) -> list[tuple[str, float]]:
        """Each class with its probability, the most probable first; see `Classifier`."""
        x = as_image(photo, self._learner.format, "photo").astype(np.float32)
        return ranked(self.names, self._learner._predict(self._arrays, x))


def load_exported(path: str | os.PathLike[str]) -> ExportedLearner:
    """The learner that `export` wrote. Needs the extra `export` (flatbuffers), and for photographs
    as files `data` (Pillow).

    Every byte is checked. Raises `CheckpointNotFound`, `CheckpointCorrupt`, `CheckpointTooNew`, and
    `ValueError` for a checkpoint that is no exported learner.
    """
    path = check_path(path, "load_exported(path=...)")
    need("flatbuffers", "load_exported", "export")
    manifest = read_manifest(path)
    meta = manifest["meta"]
    if meta.get("kind") != _KIND:
        message = f"`{path}` is not an exported learner."
        raise ValueError(explain(message, "another file", "what `eqxmeta.export` wrote"))
    shapes = {
        leaf["path"].strip("[]'\""): jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.uint8)
        for leaf in manifest["leaves"]
    }
    programs = load_below(path, shapes, "", "an exported learner")
    try:
        return ExportedLearner(programs, meta)
    except (KeyError, TypeError, ValueError) as error:
        message = f"`{path}` holds no learner that can be read."
        raise CheckpointCorrupt(explain(message, repr(error), "what `export` wrote")) from error


def _functions(learner: Learner) -> tuple[Callable, Callable]:
    """`adapt(x, y, weight)`: the arrays of the adapted model; `predict(arrays, image)`."""
    static: list[PyTree] = []

    def adapt(x: Array, y: Array, weight: Array) -> list[Array]:
        support = x, y, weight
        model = adapted_model(learner.strategy, learner.model, support, jax.random.key(0))
        arrays, rest = eqx.partition(model, eqx.is_array)
        static[:] = [rest, jax.tree.structure(arrays)]
        return jax.tree.leaves(arrays)

    def measure(arrays: list[Array], image: Array) -> Array:
        rest, structure = static
        model = eqx.combine(jax.tree.unflatten(structure, arrays), rest)
        return predict(model, image[None])[0]

    return adapt, measure


def _exported(fun: Callable, *shapes: Any) -> jax.export.Exported:
    return jax.export.export(jax.jit(fun), platforms=PLATFORMS)(*shapes)


def _check_weights(learner: Learner, adapt: Callable, measure: Callable, n: int, ways: int) -> None:
    """That an example of weight 0 makes no difference: random images, with one more and without."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(n + 1, *learner.format.shape)).astype(np.float32)
    y = (np.arange(n + 1) % ways).astype(np.int32)
    weight = (np.arange(n + 1) < n).astype(np.float32)
    y[n] = 0
    name = type(learner.strategy).__name__
    message = f"`{name}` does not take weights, by which fewer photographs are padded."
    expected = "a strategy and a loss that take `(x, y, weight)`, as those of eqxmeta do"
    try:
        found = [
            jax.jit(measure)(jax.jit(adapt)(x[:k], y[:k], weight[:k]), x[n]) for k in (n, n + 1)
        ]
    except (TypeError, ValueError) as error:
        received = str(error).splitlines()[0]
        raise ValueError(explain(message, received, expected)) from error
    cut, padded = (np.asarray(logits, np.float64)[:ways] for logits in found)
    if not np.allclose(cut, padded, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
        received = f"logits {cut.round(3)} without, {padded.round(3)} with one of weight 0"
        raise ValueError(explain(message, received, expected))
