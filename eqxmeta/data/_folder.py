"""Images from folders, one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .._arguments import check_choice, check_int_or_none, check_path
from .._errors import explain
from .._images.extra import need
from .._images.images import Images
from .._images.read import read_all
from ._npz import from_npz
from ._split import images_by_class


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
        read_all(files, size, mode),
        np.repeat(np.arange(len(classes), dtype=np.int32), counts),
        tuple(classes),
        size,
        mode,
        from_files=True,
    )
