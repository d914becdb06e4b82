"""Images from folders, one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._arguments import check_argument, check_choice, check_int_or_none, check_path
from .._errors import explain, need
from .._images.images import Images
from .._images.read import read_all
from ._npz import from_npz
from ._split import images_by_class, together


def from_folder(
    path: str | Path | Sequence[str | Path],
    split: str | Path | Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    size: int | None = None,
    mode: Literal["L", "RGB"] | None = None,
) -> Images:
    """Images in one folder a class, as photographs of your own, miniImageNet, CIFAR-FS and CUB are
    commonly kept.

        images = em.data.from_folder("photographs", size=32, mode="RGB")
        train, val, test = images.split(0.7, 0.15, 0.15, seed=0)

        train = em.data.from_folder("mini-imagenet", split="train")            # train.csv, images/
        train = em.data.from_folder("cifar100/data", "cifar100/splits/bertinetto/train.txt")
        train = em.data.from_folder("CUB_200_2011/images", "train.json", size=84, mode="RGB")

    Every folder that holds images is a class, named by its path below `path`
    (`cat`, or `animals/cat`); classes and images are in sorted order. Of several folders,
    `["spring", "autumn"]`, the classes of one name are one class.

    - `split`: which classes. `None`: all; refused if there are splits, folders or files that are
      called `train`, `test`, `validation` or the like. `"all"`: those of all splits together. A
      name such as `"train"`: what `train.csv`, `train.txt` or `train.json` in `path` says, or the
      class folders in the folder `train`; several of them are refused. A path to such a file,
      relative to `path` or to here, but not both. Or a list of
      class names, of which a folder of classes, `animals`, stands for all of them; or of pairs
      `("cat/1.jpg", "cat")`, lines `"cat/1.jpg,cat"`.
      A csv file has columns `filename` and `label` (Ravi and Larochelle 2017) or no first line that
      names them, its images lie in `path` or `path/images`, in class folders or not; txt and json
      files have such a list, a line an entry (json also as easyfsl publishes it for CUB).
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
    if not isinstance(path, str | Path):
        return _from_folders(path, split, size, mode)
    path = check_path(path, "from_folder(path=...)")
    if path.suffix == ".npz":
        if (split, size, mode) != (None, None, None):
            received = f"split={split!r}, size={size!r}, mode={mode!r}"
            expected = "no further arguments: the file holds what is meant"
            raise ValueError(explain(f"{path} is an .npz file.", received, expected))
        return from_npz(path)
    return _from_folders([path], split, size, mode)


def _from_folders(
    paths: Sequence[str | Path], split: Any, size: int | None, mode: Literal["L", "RGB"] | None
) -> Images:
    need("PIL.Image", "from_folder", "data")
    size = check_int_or_none(size, "from_folder(size=...)", minimum=1, what="pixels")
    if mode is not None:
        check_choice(mode, "from_folder(mode=...)", ("L", "RGB"), "is unknown")
    argument, expected = "from_folder(path=...)", "a folder that holds a folder a class"
    sound, several = isinstance(paths, Sequence), f"{expected}, or a list of them"
    check_argument(sound, paths, argument, several, TypeError)
    check_argument(len(paths), paths, argument, f"{expected}, one or more", fault="is empty")
    found = []
    for path in (check_path(path, argument) for path in paths):
        if not path.is_dir():
            expected += ", or an .npz file" * (len(paths) == 1)
            raise FileNotFoundError(explain("`path` is not a folder.", str(path), expected))
        found.append(images_by_class(path, split))
    classes = together(found) if len(found) > 1 else found[0]
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
