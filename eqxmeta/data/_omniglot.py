"""The Omniglot data set."""

from pathlib import Path
from typing import Literal

import numpy as np

from .._arguments import check_choice, check_path
from .._errors import explain
from .._images.images import Images
from ._npz import read_arrays
from ._omniglot_archives import download_omniglot

_FILE = "omniglot28.npz"
_CHARACTERS = 1623

# The sizes in the code of MAML (`random.seed(1)` there, over the folders in the order in which the
# operating system listed them, which nobody can repeat).
_MAML_SIZES = {"train": 1100, "val": 100, "test": 423}
_MAML_SEED = 1


def omniglot(
    root: str | Path,
    split: Literal["train", "val", "test"] = "train",
    protocol: Literal["vinyals", "maml"] = "vinyals",
    download: bool = False,
) -> Images:
    """Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): handwritten characters, 20 drawings of each.

        train = em.data.omniglot("data", split="train", download=True)
        tasks = em.tasks.Episodes(train.images, train.labels, ways=5, shots=1, queries=15,
                                  rotations=True)

    Images are `[1, 28, 28]`, 0 paper to 255 ink; a class is a character, named
    `alphabet/character01`. Every turn of a character by 90 degrees is commonly a class of its own
    (Santoro et al. 2016): `Episodes(..., rotations=True)`. A character is in one split only, so no
    turned one meets its likes in another.

    - `root`: the file `omniglot28.npz`, or the folder that holds it.
    - `protocol`: `"vinyals"` is the split that Vinyals et al. 2016 and nearly everybody since used:
      1028, 172 and 423 characters. `"maml"` is that of Finn et al. 2017: 1200 random characters
      for training, of which their code keeps 100 for validation, and 423 for testing. It is drawn
      by `numpy.random.RandomState(1).permutation(1623)` over the characters in official order:
      the first 1100, the next 100, the rest.
    - `download`: if the file is not there yet, make it from the official archives (16 MB, checked;
      needs the extra `data`).

    Raises `FileNotFoundError` without the file, `ValueError` if it is damaged or arguments are
    unknown; with `download=True` also `OSError` or `ValueError` if the archives cannot be had as
    they were published, and `ImportError` without the extra. Then no file is left behind.
    """
    check_choice(split, "split", ("train", "val", "test"), "is unknown")
    check_choice(protocol, "protocol", ("vinyals", "maml"), "is unknown")
    path = check_path(root, "omniglot(root=...)")
    if path.suffix != ".npz":
        path = path / _FILE
    if not path.exists():
        if not download:
            expected = f"{_FILE}, or download=True to make it from the official archives"
            raise FileNotFoundError(explain("`root` holds no Omniglot.", f"no {path}", expected))
        download_omniglot(path)
    arrays = _read(path)
    images, names = arrays["images"], _class_names(arrays)
    if protocol == "vinyals":
        chosen = np.flatnonzero(_vinyals(arrays, path) == split)
    else:
        chosen = np.sort(_maml_split(len(images), path)[split])
    count, drawings, height, width = images[chosen].shape
    return Images(
        images[chosen].reshape(count * drawings, 1, height, width),
        np.repeat(np.arange(count, dtype=np.int32), drawings),
        tuple(names[index] for index in chosen),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path, f"{_FILE}; remove it and use download=True to make it anew")
    images = arrays.get("images")
    named = [arrays[name] for name in ("alphabet", "character") if name in arrays]
    if (
        images is None
        or images.ndim != 4
        or images.dtype != np.uint8
        or any(names.shape != images.shape[:1] for names in named)
    ):
        found = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
        expected = (
            "`images`, uint8 [characters, drawings, height, width], and with them `alphabet` and "
            "`character` [characters]"
        )
        raise ValueError(explain(f"{path} is not Omniglot.", found, expected))
    return arrays


def _class_names(arrays: dict[str, np.ndarray]) -> list[str]:
    if "alphabet" in arrays and "character" in arrays:
        pairs = zip(arrays["alphabet"], arrays["character"], strict=True)
        return [f"{alphabet}/{character}" for alphabet, character in pairs]
    return [str(index) for index in range(len(arrays["images"]))]


def _vinyals(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
    splits = arrays.get("vinyals")
    if splits is None or splits.shape != arrays["images"].shape[:1]:
        received = "none" if splits is None else f"shape {splits.shape}"
        expected = "train, val or test for each character, in the array `vinyals`"
        raise ValueError(explain(f"{path} does not hold the Vinyals split.", received, expected))
    return splits


def _maml_split(characters: int, path: Path) -> dict[str, np.ndarray]:
    if characters != _CHARACTERS:
        message = f"{path} does not hold all of Omniglot, which protocol='maml' splits."
        raise ValueError(explain(message, f"{characters} characters", f"{_CHARACTERS}"))
    # RandomState's streams are frozen for good (NEP 19); those of `default_rng` may change.
    order = np.random.RandomState(_MAML_SEED).permutation(_CHARACTERS)
    ends = np.cumsum(list(_MAML_SIZES.values()))
    return dict(zip(_MAML_SIZES, np.split(order, ends[:-1]), strict=True))
