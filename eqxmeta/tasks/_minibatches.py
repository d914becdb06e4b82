"""Ordinary minibatches of labelled arrays, without few-shot tasks."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from .._arguments import check_int
from .._errors import explain
from .._images.format import as_float
from .._images.images import Images
from .._task.task import Task
from ._drawn import augment_keys, augmented, turned, with_turns
from ._episode_arguments import (
    check_augment,
    check_square,
    checked_images,
    checked_labels,
    checked_rotations,
    functions,
)


class Minibatches(eqx.Module):
    """Minibatches of a labelled data set, for strategies that train on all of its classes at once
    and adapt afterwards: `Baseline`, `BaselinePlusPlus`, `SimpleShot`.

    `Minibatches(images, batch_size=64)` takes what `eqxmeta.data` returns, with the names of its
    classes; `Minibatches(x, labels, batch_size=64)` any arrays. Each example is drawn by itself,
    uniformly and with replacement: a batch depends on its key alone, and there are no epochs. The
    outer step of a `Trainer(meta_batch_size=m)` sees m batches.

    - `images`, `labels`, `rotations`, `augment`: as for `Episodes`; but a class may be of any size.
      `images` may be features, `[N, features]`.
    - `batch_size`: examples a batch.

    A label is the number of its class, from 0 to `num_classes - 1`: its position in `names`.

    Raises `ValueError` or `TypeError`, naming the argument, for what is not as above.
    """

    images: Shaped[Array, "N ..."]
    numbers: Int[Array, " N"]
    batch_size: int = eqx.field(static=True)
    rotations: bool = eqx.field(static=True)
    augment: tuple[Callable, ...]
    upright_names: tuple[str, ...] = eqx.field(static=True, repr=False)

    @overload
    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
    ): ...

    @overload
    def __init__(
        self,
        images: Any,
        labels: Any,
        batch_size: int,
        *,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
    ): ...

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        batch_size: int | None = None,
        *,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
    ):
        class_names = None
        if labels is None and isinstance(images, Images):
            images, labels, class_names = images.images, images.labels, images.class_names
        if labels is None:
            expected = (
                "images and labels: `Minibatches(x, labels, batch_size=64)`; or what "
                "`eqxmeta.data` returns, which has both: `Minibatches(images, batch_size=64)`"
            )
            received = f"images={type(images).__name__}"
            raise TypeError(explain("`labels` is missing.", received, expected))
        self.batch_size = check_int(batch_size, "batch_size", minimum=1, what="examples a batch")
        self.rotations = checked_rotations(rotations)
        self.augment = functions(augment)
        self.images = checked_images(images)
        if rotations:
            check_square(self.images.shape)
        check_augment(self.augment, self.images)
        labels = checked_labels(labels, len(self.images))
        classes, numbers = np.unique(labels, return_inverse=True)
        named = classes if class_names is None else np.asarray(class_names)[classes]
        self.upright_names = tuple(map(str, named.tolist()))
        self.numbers = jnp.asarray(numbers, jnp.int32)

    @property
    def turns(self) -> int:
        """Classes that are made of one class of `labels`: 4 with rotations, else 1."""
        return 4 if self.rotations else 1

    @property
    def num_classes(self) -> int:
        return self.turns * len(self.upright_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the order of their numbers: those of the images, or the labels as
        text. After them the turned ones, if there are: `Greek/character01, 90°`."""
        return with_turns(self.upright_names, self.turns)

    def sample(self, key: PRNGKeyArray) -> Task:
        """A minibatch: no support set, and the query set `x: [batch_size, ...]`,
        `y: [batch_size]`, int32 in `range(num_classes)`. Pure, for use inside `jit`, `vmap` and
        loops."""
        examples = len(self.numbers)
        shape, most = (self.batch_size,), self.turns * examples
        drawn = jax.random.randint(key, shape, 0, most, dtype=jnp.int32)
        turn, index = jnp.divmod(drawn, examples)
        x, y = self.images[index], self.numbers[index]
        if self.rotations:
            x, y = jax.vmap(turned)(x, turn), turn * len(self.upright_names) + y
        x = as_float(x)
        if self.augment:
            x = augmented(self.augment, x, augment_keys(key, self.batch_size))
        return Task((), (x, y))
