"""The arguments of `Episodes`, checked before anything is drawn from them."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._arguments import check_argument, native
from .._errors import annotate_errors, explain, takes
from .._images.format import as_float
from ._sizes import Size, most


def checked_rotations(rotations: Any) -> bool:
    sound, fault = isinstance(rotations, bool | np.bool_), "is not True or False"
    check_argument(sound, rotations, "rotations", "True or False", TypeError, fault)
    return bool(rotations)


def functions(augment: Any) -> tuple[Callable, ...]:
    if augment is None:
        return ()
    return tuple(augment) if isinstance(augment, Sequence) else (augment,)


def _as_array(images: Any) -> np.ndarray:
    try:
        return np.asarray(images)
    except ValueError as error:
        expected = "an array `[N, ...]`, of images of one shape"
        raise ValueError(explain("`images` is not an array.", str(error), expected)) from error


def checked_images(images: Any) -> Shaped[Array, "N ..."]:
    images = images if isinstance(images, jax.Array) else _as_array(images)
    if images.shape[:1] in ((), (0,)):
        expected = "an array `[N, ...]`, N 1 or more"
        raise ValueError(explain("`images` holds no examples.", f"shape {images.shape}", expected))
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        expected = "uint8 (0 to 255, made into floats in [0, 1]) or floating (taken as it is)"
        message = "`images` has a dtype whose scale is unknown."
        raise TypeError(explain(message, images.dtype, expected))
    images = jnp.asarray(native(images) if isinstance(images, np.ndarray) else images)
    if jnp.issubdtype(images.dtype, jnp.floating) and not jnp.isfinite(images).all():
        count = int(jnp.sum(~jnp.isfinite(images)))
        message = "`images` are not finite."
        raise ValueError(explain(message, f"{count} times NaN or infinity", "finite numbers"))
    return images


def checked_labels(labels: Any, length: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (length,):
        received = f"labels of shape {labels.shape} for {length} images"
        expected = f"shape ({length},): one label an image"
        raise ValueError(explain("`labels` does not match `images`.", received, expected))
    sound, expected = labels.dtype.kind in "iuUS", "integers or strings"
    check_argument(sound, labels.dtype, "labels", expected, TypeError, "cannot name classes")
    return labels


def check_square(shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or shape[-1] != shape[-2]:
        message = "`images` cannot be turned by 90 degrees, as `rotations` wants."
        expected = "square images, [height, width] or channels first [channels, height, width]"
        raise ValueError(explain(message, f"images of shape {shape[1:]}", expected))


def check_augment(
    augment: tuple[Callable, ...], images: Shaped[Array, "N ..."], argument: str = "augment"
) -> None:
    image = jax.eval_shape(lambda x: as_float(x[0]), images)
    expected = f"`{argument}(image, *, key) -> image`, or several in a list"
    for function in augment:
        sound, name = callable(function), getattr(function, "__name__", function)
        check_argument(sound, function, argument, expected, TypeError, "is not a function")
        with annotate_errors(
            f"`{argument}`, {name}(image, key=key)",
            f"an image, {image.dtype} {image.shape}",
            expected,
            seen=lambda error, function=function: not takes(function, "image", key="key"),
        ):
            made = eqx.filter_eval_shape(lambda x, f=function: f(x, key=jax.random.key(0)), image)
        shape, dtype = getattr(made, "shape", None), getattr(made, "dtype", None)
        if (shape, dtype) != (image.shape, image.dtype):
            received = f"{name}: {image.dtype} {image.shape} becomes {made}"
            message = f"`{argument}` makes something else of an image."
            raise ValueError(explain(message, received, "an image of the same shape and dtype"))


def check_sizes(
    classes: np.ndarray, counts: np.ndarray, turns: int, ways: Size, shots: Size, queries: Size
) -> None:
    if turns * len(classes) < most(ways):
        message, received = "`labels` has too few classes for `ways`.", turns * len(classes)
        raise ValueError(explain(message, f"{received} classes", f"at least ways={ways}"))
    wanted = most(shots) + most(queries)
    small = np.flatnonzero(counts < wanted)
    if len(small):
        has = [f"{n} image{'s' * (n != 1)}" for n in counts[small].tolist()]
        pairs = zip(classes[small[:5]].tolist(), has, strict=False)
        shown = ", ".join(f"{name!r} has {images}" for name, images in pairs)
        more = f", and {len(small) - 5} more" if len(small) > 5 else ""
        message = f"`labels` has {len(small)} of {len(classes)} classes with too few examples."
        expected = (
            f"at least {wanted} examples in every class: shots={shots} + queries={queries}. "
            f"Leave out small classes before (`images.at_least({wanted})` of what `eqxmeta.data` "
            "returns), or ask for fewer examples"
        )
        raise ValueError(explain(message, f"class {shown}{more}", expected))
