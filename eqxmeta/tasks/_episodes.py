from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from .._arguments import check_int
from .._errors import explain, tracing
from .._task import Task
from ._distinct import distinct

# The keys of augmentations come from a stream of their own: what is drawn stays what it was.
_STREAM = 0x61756776


class Episodes(eqx.Module):
    """N-way K-shot classification tasks, drawn on the device from arrays that live there.

    An episode has `ways` distinct classes, uniformly and in random order: label `0` means another
    class in each. Of each class it has `shots` support and `queries` query examples, all distinct.
    As in Vinyals et al. 2016 (Matching Networks, arXiv 1606.04080), section 4.1.

    `Episodes(*data, ways=5, shots=1, queries=15)` takes what `eqxmeta.data` returns.

    - `images`: `[N, ...]`, uint8 or floating. uint8 stays so on the device, a quarter of the
      memory, and becomes floats in [0, 1] in the episode; floats are taken as they are.
    - `labels`: `[N]`, integers or strings of any values and in any order. Classes may differ in
      size; what an episode costs depends on neither the number of classes nor their sizes.
    - `ways`, `shots`, `queries`: classes a task, support and query examples a class.
    - `rotations`: every class turned by 90, 180 and 270 degrees is a class of its own, as usual for
      Omniglot (Santoro et al. 2016, arXiv 1605.06065, section 4.1): four times the classes, of
      which an episode may draw several that are turns of one. Images are turned when they are
      drawn, by `rot90` over their last two axes; they take no more memory than before.
    - `augment`: `augment(image, *, key) -> image` of the same shape and dtype, or several in the
      order in which they apply, such as `[em.data.random_crop(padding=4), em.data.random_flip]`.
      Each example of each episode gets a key of its own; images are floats by then. For training:
      evaluate on tasks without.

    Raises `ValueError` or `TypeError`, naming the argument, for arrays of wrong ranks, lengths or
    dtypes, for fewer than `ways` classes, for a class of fewer than `shots + queries` examples
    (none is left out in silence), for images that are not square if they are to be turned, and
    for an augmentation that makes something else of an image.
    """

    images: Shaped[Array, "N ..."]
    order: Int[Array, " N"]
    offsets: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    ways: int = eqx.field(static=True)
    shots: int = eqx.field(static=True)
    queries: int = eqx.field(static=True)
    rotations: bool = eqx.field(static=True)
    augment: tuple[Callable, ...]

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        ways: int | None = None,
        shots: int | None = None,
        queries: int | None = None,
        *,
        rotations: bool = False,
        augment: Callable | Sequence[Callable] = (),
    ):
        # Without defaults Python would be first to complain, of a call that says what it means.
        if labels is None:
            raise TypeError(
                explain(
                    "`labels` is missing.",
                    f"images={type(images).__name__}",
                    "images and labels: `Episodes(data.images, data.labels, ways=5, ...)`, or for "
                    "what `eqxmeta.data` returns `Episodes(*data, ways=5, ...)`",
                )
            )
        ways = check_int(ways, "ways", minimum=1, what="classes a task")
        shots = check_int(shots, "shots", minimum=1, what="support examples a class")
        queries = check_int(queries, "queries", minimum=1, what="query examples a class")
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.rotations = rotations
        self.augment = (augment,) if callable(augment) else tuple(augment)
        self.images = _checked_images(images)
        if rotations:
            _check_square(self.images.shape)
        _check_augment(self.augment, self.images)
        labels = _checked_labels(labels, len(self.images))
        classes, counts = np.unique(labels, return_counts=True)
        _check_sizes(classes, counts, self.turns, self.ways, self.shots, self.queries)
        # Examples of class `c`: `order[offsets[c] : offsets[c] + counts[c]]`.
        self.order = jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32)
        self.offsets = jnp.asarray(np.cumsum(counts) - counts, jnp.int32)
        self.counts = jnp.asarray(counts, jnp.int32)

    @property
    def turns(self) -> int:
        """Classes that are made of one class of `labels`: 4 with rotations, else 1."""
        return 4 if self.rotations else 1

    def sample(self, key: PRNGKeyArray) -> Task:
        """An episode, class by class: support `x: [ways * shots, ...]`, `y: [ways * shots]`, query
        `x: [ways * queries, ...]`, `y: [ways * queries]`; `y` is int32 in `range(ways)`. Pure, for
        use inside `jit`, `vmap` and loops."""
        class_key, example_key = jax.random.split(key)
        bases = self.counts.shape[0]
        # Class `turn * bases + base`: as if the turned images had been appended to the others.
        turn, base = jnp.divmod(distinct(class_key, self.turns * bases, self.ways), bases)
        example_keys = jax.random.split(example_key, self.ways)
        examples = self.shots + self.queries
        rank = jax.vmap(lambda k, n: distinct(k, n, examples))(example_keys, self.counts[base])
        index = self.order[self.offsets[base][:, None] + rank]
        support = self._batch(index[:, : self.shots], turn)
        query = self._batch(index[:, self.shots :], turn)
        return self._augmented(Task(support, query), key) if self.augment else Task(support, query)

    def _batch(
        self, index: Int[Array, "ways examples"], turn: Int[Array, " ways"]
    ) -> tuple[Array, Int[Array, " batch"]]:
        y = jnp.repeat(jnp.arange(self.ways, dtype=jnp.int32), index.shape[1])
        x = self.images[index.reshape(-1)]
        if self.rotations:
            x = jax.vmap(_turned)(x, jnp.repeat(turn, index.shape[1]))
        return _as_float(x), y

    def _augmented(self, task: Task, key: PRNGKeyArray) -> Task:
        def one(image: Array, key: PRNGKeyArray) -> Array:
            for number, function in enumerate(self.augment):
                image = function(image, key=jax.random.fold_in(key, number))
            return image

        (support, support_y), (query, query_y) = task.support, task.query
        keys = jax.random.split(jax.random.fold_in(key, _STREAM), len(support) + len(query))
        support = jax.vmap(one)(support, keys[: len(support)])
        query = jax.vmap(one)(query, keys[len(support) :])
        return Task((support, support_y), (query, query_y))


def _turned(image: Shaped[Array, "..."], turn: Int[Array, ""]) -> Shaped[Array, "..."]:
    """`rot90(image, turn)`, for `turn` in `range(4)`: by half a turn, then by a quarter."""
    image = jnp.where(turn >= 2, jnp.flip(image, (-2, -1)), image)
    return jnp.where(turn % 2 == 1, jnp.rot90(image, axes=(-2, -1)), image)


def _as_float(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
    if images.dtype == jnp.uint8:
        return images.astype(float) / 255
    return images


def _checked_images(images: Any) -> Shaped[Array, "N ..."]:
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    if images.ndim == 0:
        raise ValueError(
            explain("`images` has no example axis.", "a scalar", "an array `[N, ...]`")
        )
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            explain(
                "`images` has a dtype whose scale is unknown.",
                images.dtype,
                "uint8 (0 to 255, made into floats in [0, 1]) or floating (taken as it is)",
            )
        )
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating) and not jnp.isfinite(images).all():
        count = int(jnp.sum(~jnp.isfinite(images)))
        message = "`images` are not finite."
        raise ValueError(explain(message, f"{count} times NaN or infinity", "finite numbers"))
    return images


def _checked_labels(labels: Any, length: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (length,):
        raise ValueError(
            explain(
                "`labels` does not match `images`.",
                f"labels of shape {labels.shape} for {length} images",
                f"shape ({length},): one label an image",
            )
        )
    if labels.dtype.kind not in "iuUS":
        raise TypeError(
            explain("`labels` cannot name classes.", f"dtype {labels.dtype}", "integers or strings")
        )
    return labels


def _check_square(shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or shape[-1] != shape[-2]:
        raise ValueError(
            explain(
                "`images` cannot be turned by 90 degrees, as `rotations` wants.",
                f"images of shape {shape[1:]}",
                "square images, [height, width] or channels first [channels, height, width]",
            )
        )


def _check_augment(augment: tuple[Callable, ...], images: Shaped[Array, "N ..."]) -> None:
    image = jax.eval_shape(lambda x: _as_float(x[0]), images)
    expected = "`augment(image, *, key) -> image`, or several in a list"
    for function in augment:
        if not callable(function):
            raise TypeError(explain("`augment` is not a function.", repr(function), expected))
        called = f"`augment`, {getattr(function, '__name__', function)}(image, key=key)"
        with tracing(called, f"an image, {image.dtype} {image.shape}", expected):
            made = eqx.filter_eval_shape(lambda x, f=function: f(x, key=jax.random.key(0)), image)
        shape, dtype = getattr(made, "shape", None), getattr(made, "dtype", None)
        if (shape, dtype) != (image.shape, image.dtype):
            raise ValueError(
                explain(
                    "`augment` makes something else of an image.",
                    f"{getattr(function, '__name__', function)}: {image.dtype} {image.shape} "
                    f"becomes {made}",
                    "an image of the same shape and dtype",
                )
            )


def _check_sizes(
    classes: np.ndarray, counts: np.ndarray, turns: int, ways: int, shots: int, queries: int
) -> None:
    if turns * len(classes) < ways:
        raise ValueError(
            explain(
                "`labels` has too few classes for `ways`.",
                f"{turns * len(classes)} classes",
                f"at least ways={ways}",
            )
        )
    wanted = shots + queries
    small = np.flatnonzero(counts < wanted)
    if len(small):
        shown = ", ".join(f"{classes[c].item()!r} has {counts[c]}" for c in small[:5])
        more = f", and {len(small) - 5} more" if len(small) > 5 else ""
        raise ValueError(
            explain(
                f"`labels` has {len(small)} of {len(classes)} classes with too few examples.",
                f"class {shown}{more}",
                f"at least {wanted} examples in every class: shots={shots} + queries={queries}. "
                "Leave out small classes before, or ask for fewer examples",
            )
        )
