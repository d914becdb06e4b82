"""Photographs, from files into arrays."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from .._arguments import check_argument, check_path
from .._bar import progress
from .._errors import explain, need
from .format import ImageFormat
from .images import Images

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def read_image(
    path: str | Path, *, like: Images | ImageFormat
) -> Float[np.ndarray, "channels height width"]:
    """One photograph exactly as training saw its images: upright, of their size and kind, scaled.

        images = em.data.from_folder("photographs", size=32, mode="RGB")
        x = em.data.read_image("new.jpg", like=images)  # float32 [3, 32, 32] in [0, 1]

    `like`: what `from_folder` returned, or its `format`, which is all that is needed of it. Needs
    the extra `data`.

    Raises `FileNotFoundError` without the file; `ValueError` if it cannot be read, if it is not
    like those images as it is and they were read without `size` or `mode`, and for images that do
    not come from files; `TypeError` for other arguments.
    """
    path = check_path(path, "read_image(path=...)")
    sound, expected = isinstance(like, Images | ImageFormat), "what `from_folder` returns"
    check_argument(sound, type(like), "read_image(like=...)", expected, TypeError)
    how = like.format if isinstance(like, Images) else like
    if not how.from_files:
        message = "`read_image(like=...)` does not say how a file is read."
        received = "images that were arrays, of an .npz file or Omniglot"
        expected = "what `from_folder` read from files; or pass the image as an array"
        raise ValueError(explain(message, received, expected))
    need("PIL.Image", "read_image", "data")
    pixels = read_pixels(path, how.size, how.mode)
    if pixels.shape != how.shape:
        message = f"{path} is not like the images of training."
        expected = f"{described(how.shape)}; if training reads by `from_folder(..., size=84, "
        expected += "mode='RGB')`, any photograph"
        raise ValueError(explain(message, described(pixels.shape), expected))
    return how.scaled(pixels, "path")


def read_all(
    files: Sequence[Path], size: int | None, mode: str | None
) -> UInt8[np.ndarray, "N channels height width"]:
    """All of them, on several threads, with a bar on a terminal if it takes more than a moment.
    Raises `ValueError` for a file that differs from the first."""
    first = read_pixels(files[0], size, mode)
    images = np.empty((len(files), *first.shape), np.uint8)

    def read(index: int) -> None:
        image = read_pixels(files[index], size, mode)
        if image.shape != first.shape:
            kind = len(image) != len(first)
            mend = "mode='RGB' or 'L'" if kind else "size=84, for example,"
            message = f"Images differ in {'kind' if kind else 'size'}."
            received = f"{files[0]} is {described(first.shape)}, "
            received += f"{files[index]} is {described(image.shape)}"
            raise ValueError(explain(message, received, f"all alike; {mend} makes them so"))
        images[index] = image

    with ThreadPoolExecutor() as pool, progress(len(files), " images") as advance:
        for _ in pool.map(read, range(len(files))):
            advance(1)
    return images


def read_pixels(
    file: Path, size: int | None, mode: str | None
) -> UInt8[np.ndarray, "channels height width"]:
    """The bytes of one photograph, upright, as `from_folder` says of `size` and `mode`."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image = _upright(image)
            transparent = image.has_transparency_data
            kind = mode or (None if transparent else _KINDS.get(image.mode))
            if kind is None or image.mode.startswith(("I", "F")):
                raise ValueError(f"{'transparent ' * transparent}pixels of mode {image.mode}")
            if transparent:
                image = image.convert("RGBA")
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image)
            image = image.convert(kind)
            if size is not None:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        expected = "an image of 8 bits a channel, grey or colour, that Pillow can read"
        raise ValueError(explain(f"{file} cannot be read.", str(error), expected)) from error
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def _upright(image: "PillowImage") -> "PillowImage":
    """Turned as its EXIF orientation says. (Pillow's own function for it writes the rest of the
    EXIF data anew, and fails over what cameras leave there.)"""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # whatever a broken header leads to: such a picture has no orientation
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


# Pillow's modes that lose nothing on the way. Of images with transparency, or with more than 8
# bits, somebody has to say what they mean.
_KINDS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}


def described(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{'grey' if channels == 1 else 'colour'}, {height} x {width} pixels (height x width)"
