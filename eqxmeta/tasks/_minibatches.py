"""Ordinary minibatches of labelled arrays, without few-shot tasks."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .._arguments import check_int
from .._images.format import as_float
from .._images.images import Images
from .._task.task import Task
from ._drawn import augment_keys, augmented, turned
from ._labelled import Labelled


class Minibatches(Labelled):
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

    numbers: Int[Array, " N"]
    batch_size: int = eqx.field(static=True)

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
        self.batch_size = check_int(batch_size, "batch_size", minimum=1, what="examples a batch")
        numbers, _ = self._keep(images, labels, rotations, augment, "batch_size=64")
        self.numbers = jnp.asarray(numbers, jnp.int32)

    @property
    def num_classes(self) -> int:
        """How many, the turned ones too."""
        return self.turns * len(self.upright_names)

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
