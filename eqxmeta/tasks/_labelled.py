"""Labelled images, from which tasks and minibatches are drawn."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, Shaped

from .._errors import explain
from .._images.images import Images
from ._episode_arguments import (
    check_augment,
    check_square,
    checked_images,
    checked_labels,
    checked_rotations,
    functions,
)


class Labelled(eqx.Module):
    """Images on the device and what is done to them when they are drawn. A subclass keeps which of
    them are of which class."""

    images: Shaped[Array, "N ..."]
    rotations: bool = eqx.field(static=True)
    augment: tuple[Callable, ...]
    upright_names: tuple[str, ...] = eqx.field(static=True, repr=False)

    def _keep(
        self,
        images: Any,
        labels: Any,
        rotations: bool,
        augment: Callable | Sequence[Callable] | None,
        sizes: str,
    ) -> tuple[Int[np.ndarray, " N"], np.ndarray]:
        """For `__init__`: sets these fields, and returns the number of each image's class and the
        classes, of which the names are made. `sizes`: of a call, for an error that shows it."""
        class_names = None
        if labels is None and isinstance(images, Images):
            images, labels, class_names = images.images, images.labels, images.class_names
        if labels is None:
            name, received = type(self).__name__, f"images={type(images).__name__}"
            expected = f"images and labels: `{name}(x, labels, {sizes})`; or what `eqxmeta.data` "
            expected += f"returns, which has both: `{name}(images, {sizes})`"
            raise TypeError(explain("`labels` is missing.", received, expected))
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
        return numbers, named

    @property
    def turns(self) -> int:
        """Classes that are made of one class of `labels`: 4 with rotations, else 1."""
        return 4 if self.rotations else 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in sorted order: those of the images, or the labels as text. After them
        the turned ones, if there are: `Greek/character01, 90°`."""
        turned = [f"{x}, {90 * n}°" for n in range(1, self.turns) for x in self.upright_names]
        return (*self.upright_names, *turned)
