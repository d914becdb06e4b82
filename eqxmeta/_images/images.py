"""Labelled images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Int, Shaped

from .._arguments import check_argument, check_int, check_number, check_seed
from .._errors import explain
from .format import ImageFormat


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images on the host, as `eqxmeta.tasks.Episodes` takes them:

        images = em.data.from_folder("photographs", size=32, mode="RGB")
        train, val, test = images.split(0.7, 0.15, 0.15, seed=0)
        tasks = em.tasks.Episodes(train, ways=5, shots=1, queries=15)

    Iteration gives the pair of both arrays: `pixels, labels = data`.

    - `images`: `[N, channels, height, width]`, channels first as Equinox's layers want them, one
      channel for grey; uint8, or floating where a file held that.
    - `labels`: `[N]`, int32: positions in `class_names`.
    - `class_names`: one a class.
    - `size`, `mode`: how files were read, as `from_folder` was told.
    - `from_files`: whether they were.
    """

    images: Shaped[np.ndarray, "N channels height width"] = field(repr=False)
    labels: Int[np.ndarray, " N"] = field(repr=False)
    class_names: tuple[str, ...]
    size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    from_files: bool = False

    @property
    def scale(self) -> int:
        """What a model's input is divided by: 255 for bytes, 1 for floats."""
        return 255 if self.images.dtype == np.uint8 else 1

    @property
    def format(self) -> ImageFormat:
        """What a new image needs to be like these, without the images."""
        _, channels, height, width = self.images.shape
        shape = (channels, height, width)
        return ImageFormat(shape, self.size, self.mode, self.scale, self.from_files)

    def split(self, *fractions: float | int, seed: int = 0) -> tuple["Images", ...]:
        """Parts of the classes, drawn at random: no class is in two parts, for what was learnt on
        some classes is tested on others.

        Of `fractions` that add up to 1 each part has its share of the classes, rounded so that
        none is left out. The same `seed` gives the same parts for the same classes, whatever their
        images. Raises `ValueError` for other fractions, and for a part without a class.
        """
        shares = np.array([check_number(x, "split(...)", positive=True) for x in fractions])
        sound = len(shares) and abs(shares.sum() - 1) < 1e-6
        expected = "positive fractions that add up to 1, such as 0.7, 0.15, 0.15"
        check_argument(sound, fractions, "split(...)", expected)
        count, seed = len(self.class_names), check_seed(seed, "split(seed=...)")
        sizes = np.floor(count * shares + 1e-9).astype(int)
        # The largest remainders are rounded up, the first of equal ones.
        remainders = np.round(count * shares - sizes, 6)
        sizes[np.argsort(-remainders, kind="stable")[: count - sizes.sum()]] += 1
        if not sizes.all():
            received = f"{count} classes, of which {', '.join(map(str, sizes))} in the parts"
            expected = "a class or more in every part"
            raise ValueError(explain("`split(...)` leaves a part empty.", received, expected))
        # RandomState's streams are frozen for good (NEP 19); those of `default_rng` may change.
        order = np.random.RandomState(seed).permutation(count)
        parts = np.split(order, np.cumsum(sizes)[:-1])
        return tuple(self._of(sorted(part.tolist())) for part in parts)

    def at_least(self, count: int) -> "Images":
        """Without the classes that have fewer images: `Episodes` needs `shots + queries` of each.
        Raises `ValueError` if none is left."""
        count = check_int(count, "at_least(...)", minimum=1, what="images a class")
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        kept = np.flatnonzero(counts >= count)
        if not len(kept):
            received = f"{count}, and {counts.max()} in the largest class"
            raise ValueError(explain("`at_least(...)` leaves no class.", received, "fewer images"))
        return self._of(kept.tolist())

    def _of(self, classes: Sequence[int]) -> "Images":
        chosen = np.isin(self.labels, classes)
        return replace(
            self,
            images=self.images[chosen],
            labels=np.searchsorted(classes, self.labels[chosen]).astype(np.int32),
            class_names=tuple(self.class_names[c] for c in classes),
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        read = f"; size={self.size}, mode={self.mode!r}, pixels / {self.scale}"
        return (
            f"Images({count} images {shape} of {self.images.dtype}, "
            f"{len(self.class_names)} classes{read * self.from_files})"
        )
