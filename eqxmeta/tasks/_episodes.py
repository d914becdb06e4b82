from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from .._arguments import check_int
from .._errors import explain
from .._task import Task
from ._distinct import distinct


class Episodes(eqx.Module):
    """N-way K-shot classification tasks, drawn on the device from arrays that live there.

    An episode has `ways` distinct classes, uniformly and in random order: label `0` means another
    class in each. Of each class it has `shots` support and `queries` query examples, all distinct.
    As in Vinyals et al. 2016 (Matching Networks, arXiv 1606.04080), section 4.1.

    - `images`: `[N, ...]`, uint8 or floating. uint8 stays so on the device, a quarter of the
      memory, and becomes floats in [0, 1] in the episode; floats are taken as they are.
    - `labels`: `[N]`, integers or strings of any values and in any order. Classes may differ in
      size; what an episode costs depends on neither the number of classes nor their sizes.
    - `ways`, `shots`, `queries`: classes a task, support and query examples a class.

    Raises `ValueError` or `TypeError`, naming the argument, for arrays of wrong ranks, lengths or
    dtypes, for fewer than `ways` classes, and for a class of fewer than `shots + queries`
    examples: none is left out in silence.
    """

    images: Shaped[Array, "N ..."]
    order: Int[Array, " N"]
    offsets: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    ways: int = eqx.field(static=True)
    shots: int = eqx.field(static=True)
    queries: int = eqx.field(static=True)

    def __init__(self, images: Any, labels: Any, ways: int, shots: int, queries: int):
        ways = check_int(ways, "ways", minimum=1, what="classes a task")
        shots = check_int(shots, "shots", minimum=1, what="support examples a class")
        queries = check_int(queries, "queries", minimum=1, what="query examples a class")
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.images = _checked_images(images)
        labels = _checked_labels(labels, len(self.images))
        classes, counts = np.unique(labels, return_counts=True)
        _check_sizes(classes, counts, self.ways, self.shots, self.queries)
        # Examples of class `c`: `order[offsets[c] : offsets[c] + counts[c]]`.
        self.order = jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32)
        self.offsets = jnp.asarray(np.cumsum(counts) - counts, jnp.int32)
        self.counts = jnp.asarray(counts, jnp.int32)

    def sample(self, key: PRNGKeyArray) -> Task:
        """An episode, class by class: support `x: [ways * shots, ...]`, `y: [ways * shots]`, query
        `x: [ways * queries, ...]`, `y: [ways * queries]`; `y` is int32 in `range(ways)`. Pure, for
        use inside `jit`, `vmap` and loops."""
        class_key, example_key = jax.random.split(key)
        classes = distinct(class_key, self.counts.shape[0], self.ways)
        example_keys = jax.random.split(example_key, self.ways)
        examples = self.shots + self.queries
        rank = jax.vmap(lambda k, n: distinct(k, n, examples))(example_keys, self.counts[classes])
        index = self.order[self.offsets[classes][:, None] + rank]
        return Task(self._batch(index[:, : self.shots]), self._batch(index[:, self.shots :]))

    def _batch(self, index: Int[Array, "ways examples"]) -> tuple[Array, Int[Array, " batch"]]:
        y = jnp.repeat(jnp.arange(self.ways, dtype=jnp.int32), index.shape[1])
        return _as_float(self.images[index.reshape(-1)]), y


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


def _check_sizes(
    classes: np.ndarray, counts: np.ndarray, ways: int, shots: int, queries: int
) -> None:
    if len(classes) < ways:
        raise ValueError(
            explain(
                "`labels` has too few classes for `ways`.",
                f"{len(classes)} classes",
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
