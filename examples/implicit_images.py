"""Learnt initialisations for coordinate networks: a network that is a picture after two steps.

    python examples/implicit_images.py FOLDER

MAML learns weights from which two steps of descent make it any picture (Tancik et al. 2021,
2012.02189, section 4.1). FOLDER has one folder of pictures a class; a fifth is kept for test.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import eqxmeta as em
from eqxmeta.callbacks import ProgressBar


class Siren(eqx.Module):
    """From a place `[2]` in [-1, 1] to its brightness `[1]`, by sines (SIREN, 2006.09661)."""

    layers: list

    def __init__(self, width=64, depth=3, *, key):
        sizes, self.layers = [2, *[width] * depth, 1], []
        for i, layer_key in enumerate(jax.random.split(key, depth + 1)):
            layer = em.nn.Linear(sizes[i], sizes[i + 1], key=layer_key)
            bound = (6 / sizes[i]) ** 0.5 / 30 if i else 1 / sizes[i]
            weight = bound * jax.random.uniform(layer_key, layer.weight.shape, minval=-1)
            self.layers.append(eqx.tree_at(lambda x: x.weight, layer, weight))

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.sin(30 * layer(x))
        return self.layers[-1](x) + 0.5


class Pictures(eqx.Module):
    """A task is a picture `[height, width]`. In training a quarter of its pixels, for speed."""

    pictures: jax.Array

    def task(self, number):
        """All pixels of one picture, as support set and as query set."""
        axes = [jnp.linspace(-1, 1, pixels) for pixels in self.pictures.shape[1:]]
        places = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        pixels = places, self.pictures[number].reshape(-1, 1) / 255.0
        return em.Task(pixels, pixels)

    def sample(self, key):
        picture_key, pixel_key = jax.random.split(key)
        task = self.task(jax.random.randint(picture_key, (), 0, len(self.pictures)))
        rows = jax.random.permutation(pixel_key, len(task.query[0]))
        return jax.tree.map(lambda x: x[rows[: len(rows) // 4]], task)


def loss(model, batch, key):
    error, _ = em.losses.mse(model, batch, key)
    return error, {"psnr": -10 * jnp.log10(error)}  # in dB; brightness is in [0, 1]


def pictures(folder, size):
    """Those of most classes, to train on, and a hundred of the others."""
    images = em.data.from_folder(folder, size=size, mode="L")
    train, test = (jnp.asarray(x.images[:, 0]) for x in images.split(0.8, 0.2, seed=0))
    chosen = np.random.RandomState(0).permutation(len(test))[:100]
    return Pictures(train), Pictures(test[np.sort(chosen)])


def recipes(steps):
    adam = optax.adam(optax.cosine_decay_schedule(3e-4, steps))
    maml = em.MAML(loss, em.InnerLoop(optax.sgd(0.01), steps=2), adam)
    # From standard weights Adam's steps do better, here at the best of three rates.
    return maml, em.MAML(loss, em.InnerLoop(optax.adam(1e-3), steps=2), adam)


def draw(learners, test, path):
    figure = Figure((7.2, 1.25 * (1 + len(learners))), layout="constrained")
    panels = figure.subplots(1 + len(learners), 6, subplot_kw={"xticks": [], "yticks": []})
    for column, number in enumerate(np.linspace(0, len(test.pictures) - 1, 6).astype(int)):
        task = test.task(number)
        adapted = (strategy.inner_adapt(model, task.support) for strategy, model in learners)
        shown = [em.losses.predict(model, task.query[0]) for model in adapted]
        for panel, pixels in zip(panels[:, column], [task.query[1], *shown], strict=True):
            panel.imshow(pixels.reshape(test.pictures[0].shape), cmap="gray", vmin=0, vmax=1)
    for panel, name in zip(panels[:, 0], ["picture", "learnt", "standard"], strict=True):
        panel.set_ylabel(name)
    figure.savefig(path, dpi=70)


def main():
    parser = argparse.ArgumentParser(description="Learnt initialisations of pictures.")
    parser.add_argument("folder", type=Path, help="one folder of pictures a class")
    parser.add_argument("--size", type=int, default=48, help="pixels a side")
    parser.add_argument("--steps", type=int, default=500, help="outer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pictures.png"), help="a picture")
    args = parser.parse_args()
    train, test = pictures(args.folder, args.size)
    tasks = jax.vmap(test.task)(jnp.arange(len(test.pictures)))
    maml, by_adam = recipes(args.steps)
    standard = Siren(key=jax.random.key(args.seed))
    options = {"meta_batch_size": 4, "seed": args.seed, "callbacks": [ProgressBar()]}
    learnt = em.Trainer(maml, **options).fit(standard, train, args.steps).model
    print(f"\nPSNR in dB, {len(tasks.query[0])} new pictures, after 0, 2 and 8 steps, ± 95%")
    rows = {"learnt": (maml, learnt), "standard": (maml, standard)}
    for name, (strategy, model) in (rows | {"standard, Adam": (by_adam, standard)}).items():
        result = em.evaluate(strategy, model, tasks, inner_steps=8)
        mean, half = result.mean("psnr"), result.ci95("psnr")
        print(f"{name:16}" + "".join(f"{mean[k]:8.2f} ± {half[k]:.2f}" for k in (0, 2, 8)))
    draw([(maml, learnt), (by_adam, standard)], test, args.out)


if __name__ == "__main__":
    main()
