"""Images from folders, one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from .._arguments import check_choice, check_int_or_none, check_path
from .._errors import explain
from .._images.images import Images
from ._extra import need
from ._npz import from_npz
from ._split import images_by_class

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def from_folder(
    path: str | Path,
    split: str | Path | Sequence[str] | None = None,
    *,
    size: int | None = None,
    mode: Literal["L", "RGB"] | None = None,
) -> Images:
    """Images in one folder a class, as miniImageNet, CIFAR-FS and CUB are commonly kept.

        train = em.data.from_folder("mini-imagenet", split="train")            # train.csv, images/
        train = em.data.from_folder("cifar100/data", split="bertinetto/train.txt")
        train = em.data.from_folder("CUB_200_2011/images", ["001.Albatross", ...], size=84)

    Every folder that holds images is a class, named by its path below `path`
    (`cat`, or `animals/cat`); classes and images are in sorted order.

    - `split`: which classes. `None`: all; refused if there are splits, folders or files that are
      called `train`, `test`, `validation` or the like. `"all"`: those of all splits together. A
      name such as `"train"`: what `train.csv`, `train.txt` or `train.json` in `path` says, or the
      class folders in the folder `train`; several of them are refused. A path to such a file,
      relative to `path` or to here, but not both. Or a list of class names.
      A csv file has columns `filename` and `label` (Ravi and Larochelle 2017), its images lie in
      `path` or `path/images`, in class folders or not; a txt file has a class name a line; a json
      file a list of them.
    - `size`: resize every image to `size` x `size` pixels, whatever its shape was, by Pillow's
      bilinear filter (which averages where it shrinks). `None`: all must have one size.
    - `mode`: `"RGB"` or `"L"` (grey) converts every image; what is transparent becomes white.
      `None`: all must be of one kind, and opaque.

    Photographs are turned upright, as their EXIF orientation says.

    A `path` to an .npz file is read by `from_npz`, and takes no other argument. Images are uint8,
    `[1, height, width]` or `[3, height, width]`. Needs the extra `data`, and memory for all images.

    Raises `ValueError` or `FileNotFoundError`, naming the file, for empty folders, images that
    cannot be read or differ in size or kind, classes of a split that are not there, and split files
    that lead out of `path`, by `..` or an absolute path; `ValueError` for splits of which none is
    chosen, and for a list of images where classes are named.
    """
    path = check_path(path, "from_folder(path=...)")
    if path.suffix == ".npz":
        if (split, size, mode) != (None, None, None):
            received = f"split={split!r}, size={size!r}, mode={mode!r}"
            expected = "no further arguments: the file holds what is meant"
            raise ValueError(explain(f"{path} is an .npz file.", received, expected))
        return from_npz(path)
    need("PIL.Image", "from_folder")
    size = check_int_or_none(size, "from_folder(size=...)", minimum=1, what="pixels")
    if mode is not None:
        check_choice(mode, "from_folder(mode=...)", ("L", "RGB"), "is unknown")
    if not path.is_dir():
        expected = "a folder that holds a folder a class, or an .npz file"
        raise FileNotFoundError(explain("`path` is not a folder.", str(path), expected))
    classes = images_by_class(path, split)
    files = [file for images in classes.values() for file in images]
    counts = [len(images) for images in classes.values()]
    return Images(
        _read_all(files, size, mode),
        np.repeat(np.arange(len(classes), dtype=np.int32), counts),
        tuple(classes),
    )


def _read_all(
    files: Sequence[Path], size: int | None, mode: str | None
) -> UInt8[np.ndarray, "N channels height width"]:
    first = _read(files[0], size, mode)
    images = np.empty((len(files), *first.shape), np.uint8)
    for index, file in enumerate(files):
        image = _read(file, size, mode)
        if image.shape != first.shape:
            kind = len(image) != len(first)
            mend = "mode='RGB' or 'L'" if kind else "size=84, for example,"
            message = f"Images differ in {'kind' if kind else 'size'}."
            received = f"{files[0]} is {_described(first)}, {file} is {_described(image)}"
            raise ValueError(explain(message, received, f"all alike; {mend} makes them so"))
        images[index] = image
    return images


def _read(
    file: Path, size: int | None, mode: str | None
) -> UInt8[np.ndarray, "channels height width"]:
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


def _described(image: np.ndarray) -> str:
    channels, height, width = image.shape
    return f"{'grey' if channels == 1 else 'colour'}, {height} x {width} pixels (height x width)"
