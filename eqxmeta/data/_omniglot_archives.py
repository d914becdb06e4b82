"""Omniglot's official archives, made into one compact file."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from .._errors import explain
from .._files.atomic import replacing
from ._download import Remote, fetch, opened_archive
from ._extra import need

_CALLER = "omniglot(download=True)"
_DRAWERS = 20
_SIDE = 105  # pixels of a drawing as published
_SMALL = 28  # and as the field uses it
_MEMBER = re.compile(r"images_\w+/([^/]+)/(character\d+)/(\d{4})_(\d{2})\.png")
# Drawings are a few hundred bytes each; both archives unpack to about 15 MB.
_MEMBER_SIZE, _TOTAL_SIZE = 2**17, 2**26


@dataclass(frozen=True)
class _Part:
    """One of the two archives: `background` or `evaluation`, and the characters it holds."""

    split: str
    remote: Remote
    characters: int


# Sizes and sha256 as TensorFlow Datasets pins them.
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_PARTS = (
    _Part(
        "background",
        Remote(
            f"{_URL}/images_background.zip",
            "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            9_464_212,
        ),
        964,
    ),
    _Part(
        "evaluation",
        Remote(
            f"{_URL}/images_evaluation.zip",
            "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            6_462_886,
        ),
        659,
    ),
)

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

    Raises `OSError` or `ValueError` if a download fails or is not the published file.
    """
    need("PIL.Image", _CALLER)
    characters = []
    for part in _PARTS:
        # A folder of the system's: what a killed process leaves there is cleared away.
        with tempfile.TemporaryDirectory(prefix="eqxmeta-") as folder:
            characters += _read_part(part, fetch(part.remote, Path(folder), _CALLER))
    characters.sort(key=lambda character: character.number)
    arrays = {
        "images": np.stack([character.drawings for character in characters]),
        "alphabet": np.array([character.alphabet for character in characters]),
        "character": np.array([character.name for character in characters]),
        "split": np.array([character.split for character in characters]),
        "vinyals": np.array([vinyals_split(c.number, c.alphabet) for c in characters]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


@dataclass(frozen=True)
class _Character:
    number: int
    alphabet: str
    name: str
    split: str
    drawings: UInt8[np.ndarray, "drawers height width"]


def _read_part(part: _Part, path: Path) -> list[_Character]:
    found = list(_read_characters(part, path))
    if len(found) != part.characters:
        expected = f"{part.characters} characters, {_DRAWERS} drawings of each"
        message = f"The archive {path.name} is incomplete."
        raise ValueError(explain(message, f"{len(found)} characters", expected))
    return found


def _read_characters(part: _Part, path: Path) -> Iterator[_Character]:
    members: dict[tuple[int, str, str], dict[int, str]] = {}
    with opened_archive(path, member_size=_MEMBER_SIZE, total_size=_TOTAL_SIZE) as (archive, infos):
        for info in infos:
            if match := _MEMBER.fullmatch(info.filename):
                alphabet, character, number, drawer = match.groups()
                drawings = members.setdefault((int(number), alphabet, character), {})
                drawings[int(drawer)] = info.filename
        for (number, alphabet, character), drawings in members.items():
            if sorted(drawings) != list(range(1, _DRAWERS + 1)):
                raise ValueError(
                    explain(
                        f"The archive {path.name} is incomplete.",
                        f"drawings {sorted(drawings)} of {alphabet}/{character}",
                        f"{_DRAWERS} drawings",
                    )
                )
            images = []
            for _, name in sorted(drawings.items()):
                with archive.open(name) as file:
                    images.append(_shrunk(file, f"{path.name}/{name}"))  # pyright: ignore
            yield _Character(number, alphabet, character, part.split, np.stack(images))


def _shrunk(file: BinaryIO, name: str) -> UInt8[np.ndarray, "height width"]:
    """0 paper to 255 ink, `[28, 28]`: the mean over the pixels whose centre is in a cell."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.size != (_SIDE, _SIDE) or image.mode not in ("1", "L"):
                raise ValueError(f"{image.mode} of {image.size} pixels")
            # Pillow takes the nearest pixel in two-level images, whatever filter it is asked for.
            grey = image.convert("L").resize((_SMALL, _SMALL), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        expected = f"a PNG of {_SIDE} x {_SIDE} pixels, in black and white"
        raise ValueError(explain(f"{name} is not a drawing.", str(error), expected)) from error
    return 255 - np.asarray(grey)
