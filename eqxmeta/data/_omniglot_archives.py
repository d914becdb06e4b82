"""Omniglot's official archives, made into one compact file."""

import re
import tempfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8

from .._errors import explain, need
from .._files.atomic import replacing

_CALLER = "omniglot(download=True)"
_SMALL = 28  # pixels of a side as the field uses it; drawings are published with 105
_MEMBER = re.compile(r"images_\w+/([^/]+)/(character\d+)/(\d{4})_\d{2}\.png")

# The sha256 of each archive, as TensorFlow Datasets pins it.
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_ARCHIVES = {
    "background": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "evaluation": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
}

# The split of Vinyals et al. 2016 as Snell et al. 2017 published it, as a rule: characters are
# numbered 1 to 1623, in the order of the archives. The validation set is five whole alphabets.
_VINYALS_VAL = (
    "Armenian",
    "Bengali",
    "Early_Aramaic",
    "Hebrew",
    "Mkhedruli_(Georgian)",
)
_VINYALS_TRAIN_AND_VAL = 1200


def vinyals_split(number: int, alphabet: str) -> str:
    if number > _VINYALS_TRAIN_AND_VAL:
        return "test"
    return "val" if alphabet in _VINYALS_VAL else "train"


def download_omniglot(path: Path) -> None:
    """Download both archives and write the compact file `path`, or leave nothing behind.

    Raises `OSError` if a download fails, `ValueError` if it is not the published file.
    """
    need("PIL.Image", _CALLER, "data")
    drawings: dict[tuple[int, str, str, str], list[np.ndarray]] = {}
    for split, sha256 in _ARCHIVES.items():
        # A folder of the system's: what a killed process leaves there is cleared away.
        with tempfile.TemporaryDirectory(prefix="eqxmeta-") as folder:
            _read(_fetch(f"{_URL}/images_{split}.zip", sha256, folder), split, drawings)
    characters = sorted(drawings)
    _, alphabets, names, splits = zip(*characters, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(
            file,
            images=np.array([drawings[character] for character in characters]),
            alphabet=np.array(alphabets),
            character=np.array(names),
            split=np.array(splits),
            vinyals=np.array([vinyals_split(n, alphabet) for n, alphabet, *_ in characters]),
        )


def _fetch(url: str, sha256: str, folder: str) -> str:
    pooch = need("pooch", _CALLER, "data")
    try:
        return pooch.retrieve(url, known_hash=sha256, fname=url.rpartition("/")[2], path=folder)
    except OSError as error:  # those of requests, too
        expected = "an answer from the server; or make the file on another computer and copy it"
        raise OSError(explain(f"{url} could not be downloaded.", repr(error), expected)) from error
    except ValueError as error:
        message = f"{url} has changed since it was published."
        raise ValueError(explain(message, str(error), f"a file of sha256 {sha256}")) from error


def _read(
    path: str, split: str, drawings: dict[tuple[int, str, str, str], list[np.ndarray]]
) -> None:
    """Add the drawings of an archive by character, in the order of the people who drew them."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if match := _MEMBER.fullmatch(name):
                alphabet, character, number = match.groups()
                with archive.open(name) as file:
                    drawing = _shrunk(file)
                drawings.setdefault((int(number), alphabet, character, split), []).append(drawing)


def _shrunk(file: IO[bytes]) -> UInt8[np.ndarray, "height width"]:
    """0 paper to 255 ink, `[28, 28]`: the mean over the pixels whose centre is in a cell."""
    from PIL import Image

    with Image.open(file) as image:
        # Pillow takes the nearest pixel in two-level images, whatever filter it is asked for.
        grey = image.convert("L").resize((_SMALL, _SMALL), Image.Resampling.BOX)
    return 255 - np.asarray(grey)
