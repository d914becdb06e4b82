"""The tables and their rows, each by the recipe of the example that it belongs to."""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxmeta as em
from examples import implicit_images, navigation, omniglot, photos, sinusoid


class Setting(NamedTuple):
    """What is trained and measured. Without `train` nothing is trained."""

    strategy: Any
    inner_steps: int | None
    meta_batch: int
    model: Any
    train: Any
    val: Any
    tests: dict[str, Any]  # by the column of the table
    counts: int | None = None  # the inner step that rows are ranked by; `None`: the last


@dataclass(frozen=True)
class Table:
    """`prepare(options, name, steps, seed)` is a row's setting. `after`: the inner steps that are
    reported beside the one that counts. `parent`: the table whose best rows are this one's."""

    title: str
    names: Sequence[str]
    prepare: Callable[[argparse.Namespace, str, int, int], Setting]
    note: str
    metric: str = "accuracy"
    after: tuple[int, ...] = ()
    parent: str = ""
    best: int = 0


CENTROID = "pixel centroid"


def _centroid(tests: dict[str, Any]) -> Setting:
    strategy = em.ProtoNet(em.losses.cross_entropy, optax.sgd(0.1))
    return Setting(strategy, None, 1, eqx.nn.Identity(), None, None, tests)


def _omniglot(ways: int, shots: int, options, name: str, steps: int, seed: int) -> Setting:
    if name == CENTROID:
        queries = min(15, 20 - shots)
        return _centroid(
            {"accuracy": omniglot.episodes(options.omniglot, "test", ways, shots, queries)}
        )
    sizes = {"ways": ways, "shots": shots, "width": 32, "seed": seed}
    recipe, model, (train, val, test) = omniglot.prepare(name, options.omniglot, steps, **sizes)
    return Setting(*recipe, model, train, val, {"accuracy": test})


@functools.cache
def _photographs(folder, size: int):
    return em.data.from_folder(folder, size=size, mode="RGB")


def _groceries(size: int, options, name: str, steps: int, seed: int) -> Setting:
    images = _photographs(options.groceries, size)
    classes, *_ = photos.split(images)
    batches = None
    if name in ("Baseline", "BaselinePlusPlus", "SimpleShot"):
        augment = photos.augmented(size)
        batches = em.tasks.Minibatches(classes, batch_size=64, augment=augment)
    recipes = photos.recipes(steps, False)
    if name not in recipes and name != CENTROID:  # those that need more than the photographs
        body = em.nn.Conv4(3, None, size=size, width=32, key=jax.random.key(0))
        features = jax.eval_shape(body, jax.ShapeDtypeStruct((3, size, size), "float32")).size
        recipes = omniglot.recipes(steps, features, batches)
    recipe = recipes.get(name, (None, None, 1))
    train, val, *tests = photos.episodes(images, size, recipe[2])
    tests = {f"{shots}-shot": test for shots, test in zip((1, 5), tests, strict=True)}
    if name == CENTROID:
        return _centroid(tests)
    model = photos.network(recipe, size=size, width=32, seed=seed)
    return Setting(*recipe, model, batches or train, val, tests)


def _sinusoid(shots: int, options, name: str, steps: int, seed: int) -> Setting:
    strategy, model = sinusoid.recipes(steps)[name], sinusoid.NETWORKS.get(name, sinusoid.NETWORK)
    train, test = sinusoid.sources(shots)
    own = strategy.num_inner_steps()
    most = own and max(own, 10)
    return Setting(strategy, most, 25, model, train, test, {"loss": test}, own)


def _navigation(options, name: str, steps: int, seed: int) -> Setting:
    (strategy,) = (s for s in navigation.recipes(steps) if type(s).__name__ == name)
    model, goals = navigation.Policy(jax.random.key(seed)), navigation.Goals()
    return Setting(strategy, 3, 20, model, goals, goals, {"return": goals}, 1)


def _pictures(options, name: str, steps: int, seed: int) -> Setting:
    train, test = implicit_images.pictures(options.groceries, 48)
    tests = {"PSNR": jax.vmap(test.task)(jnp.arange(len(test.pictures)))}
    standard = implicit_images.Siren(key=jax.random.key(seed))
    maml, by_adam = implicit_images.recipes(steps)
    if name == "MAML":
        return Setting(maml, 8, 4, standard, train, train, tests, 2)
    strategy = by_adam if name == "standard by Adam" else maml
    return Setting(strategy, 8, 4, standard, None, None, tests, 2)


_OMNIGLOT = (CENTROID, *omniglot.recipes(1))
_OTHERS = ("RelationNet", "LearntUpdate", "Baseline", "BaselinePlusPlus", "SimpleShot")
_GROCERIES = (CENTROID, *photos.recipes(1, False), *_OTHERS)
_DRAWINGS = "Vinyals split, with rotations; `Conv4` of width 32."
_PHOTOGRAPHS = "65 classes, split by class; `Conv4` of width 32."
_PIXELS = "PSNR in dB, 100 pictures of new classes; checkpoints are chosen on training classes."
_WALKS = "Goals on the unit circle; mean return of 20 walks, as trained and after so many steps."
_WAVES = "Phase in [0, π]; mean squared error, as trained and after so many inner steps."


def _drawings(title: str, ways: int, shots: int, **more: Any) -> Table:
    prepare = functools.partial(_omniglot, ways, shots)
    return Table(f"Omniglot, {title}", _OMNIGLOT, prepare, _DRAWINGS, **more)


def _photos(size: int, **more: Any) -> Table:
    prepare, title = functools.partial(_groceries, size), f"Groceries, 5-way, {size}x{size}"
    return Table(title, _GROCERIES, prepare, _PHOTOGRAPHS, **more)


def _waves(shots: int) -> Table:
    names, prepare = tuple(sinusoid.recipes(1)), functools.partial(_sinusoid, shots)
    title, after = f"Sinusoids, {shots} shots", (0, 1, 5, 10)
    return Table(title, names, prepare, _WAVES, metric="loss", after=after)


TABLES = {
    "omniglot-5way-1shot": _drawings("5-way 1-shot", 5, 1),
    "groceries-32": _photos(32),
    "sinusoid-10shot": _waves(10),
    "sinusoid-5shot": _waves(5),
    "navigation": Table(
        "Navigation", ("Joint", "MAML"), _navigation, _WALKS, metric="return", after=(0, 1, 3)
    ),
    "groceries-coordinates": Table(
        "Coordinate networks, 48x48",
        ("MAML", "standard", "standard by Adam"),
        _pictures,
        _PIXELS,
        metric="psnr",
        after=(0, 2, 8),
    ),
    "omniglot-5way-5shot": _drawings("5-way 5-shot", 5, 5, parent="omniglot-5way-1shot", best=6),
    "omniglot-20way-1shot": _drawings("20-way 1-shot", 20, 1, parent="omniglot-5way-1shot", best=3),
    "groceries-84": _photos(84, parent="groceries-32", best=3),
}
