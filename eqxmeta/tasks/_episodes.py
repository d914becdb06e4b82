"""Few-shot classification episodes from labelled arrays."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._images.format import as_float
from .._images.images import Images
from .._task.task import Task
from ._distinct import distinct
from ._drawn import augment_keys, augmented, turned
from ._episode_arguments import check_augment, check_sizes, functions
from ._labelled import Labelled
from ._sizes import Size, checked_size, draw_size, most, with_padding

# The keys of sizes come from a stream of their own: what is drawn stays what it was.
_SIZES = 0x73697A65


class Episodes(Labelled):
    """N-way K-shot classification tasks, drawn on the device from arrays that live there.

    An episode has `ways` distinct classes, uniformly and in random order: label `0` means another
    class in each. Of each class it has `shots` support and `queries` query examples, all distinct.
    As in Vinyals et al. 2016 (Matching Networks, arXiv 1606.04080), section 4.1.

    `Episodes(images, ways=5, shots=1, queries=15)` takes what `eqxmeta.data` returns, with the
    names of its classes; `Episodes(x, labels, ways=5, ...)` any arrays.

    - `images`: `[N, ...]`, uint8 or floating. uint8 stays so on the device, a quarter of the
      memory, and becomes floats in [0, 1] in the episode; floats are taken as they are.
    - `labels`: `[N]`, integers or strings of any values and in any order. Classes may differ in
      size; what an episode costs depends on neither the number of classes nor their sizes.
    - `ways`, `shots`, `queries`: classes a task, support and query examples a class. A pair
      `(least, most)`, as in `ways=(5, 20), shots=(1, 10)`, is a number that is drawn for each task,
      uniformly and independently of the others; the classes of a task are all of one size. Then
      support and query are `(x, y, weight)`, arrays of the largest size in which what the task does
      not have is padding: weight 0, label 0, an image of zeros. A task costs what the largest does.
      `ways=(5, 5)` are five, for a model of more logits, which the weights tell to use five.
    - `rotations`: every class turned by 90, 180 and 270 degrees is a class of its own, as usual for
      Omniglot (Santoro et al. 2016, arXiv 1605.06065, section 4.1): four times the classes, of
      which an episode may draw several that are turns of one. Images are turned when they are
      drawn, by `rot90` over their last two axes; they take no more memory than before.
    - `augment`: `augment(image, *, key) -> image` of the same shape and dtype, or several in the
      order in which they apply, such as `[em.data.random_crop(padding=4), em.data.random_flip]`;
      `None` is none. Each example of each episode gets a key of its own; images are floats by then.
      For training: evaluate on tasks without.
    - `augment_support`: the same for the support set alone, after `augment`.

    Which classes an episode has, `classes(key)` says: positions in `names`.

    Raises `ValueError` or `TypeError`, naming the argument, for arrays of wrong ranks, lengths or
    dtypes, for fewer than `ways` classes, for a class of fewer than `shots + queries` examples, the
    most of each (none is left out in silence), for images that are not square if they are to be
    turned, and for an augmentation that makes something else of an image.
    """

    order: Int[Array, " N"]
    offsets: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    ways: Size = eqx.field(static=True)
    shots: Size = eqx.field(static=True)
    queries: Size = eqx.field(static=True)
    augment_support: tuple[Callable, ...]

    # For type checkers: of `*data` they do not know that it is two.
    @overload
    def __init__(
        self,
        images: Images,
        *,
        ways: Size,
        shots: Size,
        queries: Size,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
        augment_support: Callable | Sequence[Callable] | None = (),
    ): ...

    @overload
    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        ways: Size,
        shots: Size,
        queries: Size,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
        augment_support: Callable | Sequence[Callable] | None = (),
    ): ...

    @overload
    def __init__(
        self,
        images: Any,
        labels: Any,
        ways: Size,
        shots: Size,
        queries: Size,
        *,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
        augment_support: Callable | Sequence[Callable] | None = (),
    ): ...

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        ways: Size | None = None,
        shots: Size | None = None,
        queries: Size | None = None,
        *,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] | None = (),
        augment_support: Callable | Sequence[Callable] | None = (),
    ):
        # Without defaults Python would be first to complain, of a call that says what it means.
        call = "ways=5, shots=1, queries=15"
        numbers, classes = self._keep(images, labels, rotations, augment, call)
        self.ways = checked_size(ways, "ways", "classes a task")
        self.shots = checked_size(shots, "shots", "support examples a class")
        self.queries = checked_size(queries, "queries", "query examples a class")
        self.augment_support = functions(augment_support)
        check_augment(self.augment_support, self.images, "augment_support")
        counts = np.bincount(numbers)
        check_sizes(classes, counts, self.turns, self.ways, self.shots, self.queries)
        # Examples of class `c`: `order[offsets[c] : offsets[c] + counts[c]]`.
        self.order = jnp.asarray(np.argsort(numbers, kind="stable"), jnp.int32)
        self.offsets = jnp.asarray(np.cumsum(counts) - counts, jnp.int32)
        self.counts = jnp.asarray(counts, jnp.int32)

    def classes(self, key: PRNGKeyArray) -> Int[Array, " ways"]:
        """What class each label of `sample(key)` is, by its position in `names`; -1 for a label
        that the task does not have."""
        class_key, _ = jax.random.split(key)
        classes = self._drawn(class_key)
        ways, _, _ = self._sizes(key)
        return jnp.where(jnp.arange(len(classes)) < ways, classes, -1)

    def _sizes(self, key: PRNGKeyArray) -> list[int | Int[Array, ""]]:
        """The numbers of ways, shots and queries of `sample(key)`."""
        keys = jax.random.split(jax.random.fold_in(key, _SIZES), 3)
        sizes = self.ways, self.shots, self.queries
        return [draw_size(key, size) for key, size in zip(keys, sizes, strict=True)]

    def _drawn(self, key: PRNGKeyArray) -> Int[Array, " ways"]:
        # Class `turn * bases + base`: as if the turned images had been appended to the others.
        return distinct(key, self.turns * self.counts.shape[0], most(self.ways))

    def sample(self, key: PRNGKeyArray) -> Task:
        """An episode, class by class: support `x: [ways * shots, ...]`, `y: [ways * shots]`, query
        `x: [ways * queries, ...]`, `y: [ways * queries]`; `y` is int32 in `range(ways)`. Of sizes
        that are drawn the shapes are those of the most, and there are weights. Pure, for use inside
        `jit`, `vmap` and loops."""
        ways, shots, queries = most(self.ways), most(self.shots), most(self.queries)
        class_key, example_key = jax.random.split(key)
        turn, base = jnp.divmod(self._drawn(class_key), self.counts.shape[0])
        example_keys = jax.random.split(example_key, ways)
        examples = shots + queries
        rank = jax.vmap(lambda k, n: distinct(k, n, examples))(example_keys, self.counts[base])
        index = self.order[self.offsets[base][:, None] + rank]
        task = Task(self._batch(index[:, :shots], turn), self._batch(index[:, shots:], turn))
        task = self._augmented(task, key) if self.augment or self.augment_support else task
        if (ways, shots, queries) == (self.ways, self.shots, self.queries):
            return task
        n, k, q = self._sizes(key)
        return Task(with_padding(task.support, ways, n, k), with_padding(task.query, ways, n, q))

    def _batch(
        self, index: Int[Array, "ways examples"], turn: Int[Array, " ways"]
    ) -> tuple[Array, Int[Array, " batch"]]:
        y = jnp.repeat(jnp.arange(index.shape[0], dtype=jnp.int32), index.shape[1])
        x = self.images[index.reshape(-1)]
        if self.rotations:
            x = jax.vmap(turned)(x, jnp.repeat(turn, index.shape[1]))
        return as_float(x), y

    def _augmented(self, task: Task, key: PRNGKeyArray) -> Task:
        (support, support_y), (query, query_y) = task.support, task.query
        keys = augment_keys(key, len(support) + len(query))
        of_support = self.augment + self.augment_support
        support = augmented(of_support, support, keys[: len(support)])
        query = augmented(self.augment, query, keys[len(support) :])
        return Task((support, support_y), (query, query_y))
