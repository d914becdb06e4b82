"""Labelled images."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Shaped


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images on the host, as `eqxmeta.tasks.Episodes` takes them:

        data = em.data.omniglot("data", split="train")
        tasks = em.tasks.Episodes(data.images, data.labels, ways=5, shots=1, queries=15)

    The pair of both is what iteration gives: `images, labels = data`, `Episodes(*data, ...)`.

    - `images`: `[N, channels, height, width]`, channels first as Equinox's layers want them, one
      channel for grey; uint8, or floating where a file held that.
    - `labels`: `[N]`, int32: positions in `class_names`.
    - `class_names`: one a class.
    """

    images: Shaped[np.ndarray, "N channels height width"] = field(repr=False)
    labels: Int[np.ndarray, " N"] = field(repr=False)
    class_names: tuple[str, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        return (
            f"Images({count} images {shape} of {self.images.dtype}, "
            f"{len(self.class_names)} classes)"
        )
