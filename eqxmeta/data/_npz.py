"""Images from an `.npz` file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .._arguments import check_path, native
from .._errors import explain
from .._images.images import Images

# What NumPy raises for a file that is damaged or of another kind; encryption is a `RuntimeError`,
# and a `MemoryError` what a damaged header asks for.
_NOT_AN_ARCHIVE = (
    ValueError,
    TypeError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def from_npz(path: str | Path) -> Images:
    """Labelled images from a NumPy archive: its arrays `images` and `labels`.

        train = em.data.from_npz("mini-imagenet-train.npz")

    - `images`: uint8 or floating, `[N, height, width]`, `[N, channels, height, width]` or
      `[N, height, width, channels]` with 1 or 3 channels. They come out channels first.
      Floats become those of this machine, of 64 bits at most.
    - `labels`: `[N]`, integers or strings of any values. Classes are numbered in sorted order.

    Raises `FileNotFoundError`, or `ValueError` for a damaged file and for arrays that are missing
    or of another kind. Nothing is unpickled.
    """
    path = check_path(path, "from_npz(path=...)")
    expected = "an .npz file with arrays `images` [N, ...] and `labels` [N]"
    if not path.is_file():
        raise FileNotFoundError(explain("`path` is not a file.", str(path), expected))
    arrays = read_arrays(path, expected)
    if missing := {"images", "labels"} - set(arrays):
        raise ValueError(explain(f"{path} lacks an array.", f"no {min(missing)}", expected))
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim not in (3, 4) or not (
        images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)
    ):
        received = f"{images.dtype} {images.shape}"
        kinds = "uint8 or floating, [N, height, width] or with channels of their own axis"
        raise ValueError(explain(f"`images` in {path} are not images.", received, kinds))
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuUS" or not len(labels):
        received = f"{labels.dtype} {labels.shape} for {len(images)} images"
        kinds = "integers or strings, one an image, one image or more"
        raise ValueError(explain(f"`labels` in {path} do not name classes.", received, kinds))
    names, numbers = np.unique(labels, return_inverse=True)
    if names.dtype.kind == "S":
        names = _decoded(names, path)
    return Images(
        _channels_first(native(images), path),
        numbers.astype(np.int32),
        tuple(map(str, names.tolist())),
    )


def read_arrays(path: Path, expected: str) -> dict[str, np.ndarray]:
    """All arrays of the file. Raises `ValueError` if it is damaged; nothing is unpickled."""
    try:
        # NumPy would leave a damaged file open that it opened itself.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member that is not an array")
    except _NOT_AN_ARCHIVE as error:
        raise ValueError(explain(f"{path} cannot be read.", repr(error), expected)) from error
    return arrays


def _decoded(names: np.ndarray, path: Path) -> np.ndarray:
    try:
        return np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
        message, expected = f"`labels` in {path} are not text.", "strings, or bytes in UTF-8"
        raise ValueError(explain(message, repr(error.object), expected)) from error


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] in (1, 3):
        return images
    if images.shape[3] in (1, 3):
        return np.ascontiguousarray(np.moveaxis(images, 3, 1))
    message = f"`images` in {path} have no axis of channels."
    expected = "1 or 3 channels as the second or the last axis"
    raise ValueError(explain(message, f"shape {images.shape}", expected))
