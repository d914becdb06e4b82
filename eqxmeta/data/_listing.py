"""What a list says is in a split: names of classes, or images with their classes."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from .._arguments import check_argument
from .._errors import explain

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm")
_IMAGE = re.compile(rf"[\s\"']*(.+?({'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\b", re.IGNORECASE)


class Entries(NamedTuple):
    """One of both is empty. `pairs`: of an image and its class."""

    names: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()


def entries_in(file: Path) -> Entries:
    """What a csv, txt or json file lists."""
    text = _text(file)
    if file.suffix == ".csv":
        return Entries(pairs=_rows(text, file))
    if file.suffix == ".txt":
        return entries_of([line.strip() for line in text.splitlines() if line.strip()], str(file))
    try:
        listed = json.loads(text)
        if isinstance(listed, dict) and isinstance(listed.get("class_roots"), list):
            # As easyfsl publishes that of CUB; where the folder lies, `path` says.
            listed = [PurePath(root).name for root in listed["class_roots"]]
        return entries_of(listed, str(file))
    except ValueError as error:
        expected = 'a list of class names, such as ["cat", "dog"]'
        raise ValueError(explain(f"{file} is not a split.", str(error), expected)) from error


def entries_of(listed: Any, source: str) -> Entries:
    """Names of classes; or, if each of them is `image,class` or a pair of both, such pairs.
    `source` is told. Raises `ValueError` for anything else."""
    sound = isinstance(listed, Sequence) and not isinstance(listed, str)
    rows = [_pair(entry) for entry in listed] if sound else []
    pairs = [row for row in rows if row is not None]
    if pairs and len(pairs) == len(rows):
        return Entries(pairs=pairs)
    sound = sound and all(isinstance(name, str) for name in listed)
    expected = (
        "a list of class names, or of pairs ('apple/1.jpg', 'apple'); or the name of a split or of "
        "its file"
    )
    check_argument(sound, listed, "split", expected, ValueError, "does not name classes")
    return Entries(names=list(listed))


def _pair(entry: Any) -> tuple[str, str] | None:
    """Of `apple/1.jpg, apple`, as a line or in two. `None` for what may mean something else."""
    parts = entry.split(",") if isinstance(entry, str) else entry
    if not isinstance(parts, Sequence) or len(parts) != 2:
        return None
    if not all(isinstance(part, str) for part in parts):
        return None
    image, label = (part.strip() for part in parts)
    path = PurePath(image)
    sound = path.suffix.lower() in IMAGE_SUFFIXES and label and not path.anchor
    return (image, label) if sound else None


def _rows(text: str, file: Path) -> list[tuple[str, str]]:
    """`filename,label`, as Ravi and Larochelle 2017 published the split of miniImageNet; or such
    lines without the first, which names the columns."""
    lines = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if row]
    found = [_pair(row) for row in lines]
    if found and all(found):
        return [pair for pair in found if pair]
    header = lines[0] if lines else []
    image = next((name for name in ("filename", "path") if name in header), None)
    if image is None or "label" not in header:
        expected = "columns named filename and label: 'filename,label' as the first line, then "
        expected += "one line an image, such as 'apple/1.jpg,apple'"
        raise ValueError(explain(f"{file} is not a split.", repr(header), expected))
    width, first, second = len(header), header.index(image), header.index("label")
    padded = [[*row, *[""] * width] for row in lines[1:]]
    pairs = [(row[first], row[second]) for row in padded]
    if not pairs or not all(map(all, pairs)) or any(len(row) > width for row in lines):
        expected = "one image or more, each with its class"
        raise ValueError(explain(f"{file} names no images.", f"{len(pairs)} lines", expected))
    return pairs


def listed_images(
    pairs: Sequence[tuple[str, str]], path: Path, source: str
) -> dict[str, list[Path]]:
    """The images of each class, both sorted."""
    check_below([name for pair in pairs for name in pair], path, source)
    found: dict[str, list[Path]] = {}
    labels: dict[str, str] = {}
    for filename, label in pairs:
        image = _place_of(filename, label, path, source)
        place = os.path.realpath(image)
        if (other := labels.get(place, label)) != label:
            message = f"{source} puts an image into two classes."
            received = f"{filename} of {other!r} and of {label!r}, both {image}"
            raise ValueError(explain(message, received, "one label for each image"))
        # An image that is listed twice is one: else it could be support and query of one task.
        if place not in labels:
            found.setdefault(label, []).append(image)
        labels[place] = label
    return {label: sorted(images) for label, images in sorted(found.items())}


def refuse_images(names: Sequence[str], path: Path, source: str) -> None:
    """Lines such as `apple/1.jpg, 0, 3`, taken for the names of classes."""
    for name in names:
        if (match := _IMAGE.match(name)) and not (path / name).is_dir():
            image = PurePath(match[1])
            if image.anchor:  # what is listed is named as it lies in `path`
                image = PurePath(image.parent.name, image.name)
            row = f"{image},{image.parent.name or 'its class'}"
            expected = f"names of classes; or an image and its class in every line, {row!r}"
            received = f"{name!r}, the first of {len(names)} lines"
            raise ValueError(explain(f"{source} names images, not classes.", received, expected))


def check_below(names: Sequence[str], path: Path, source: str) -> None:
    """Split files come from strangers: what they name is in `path`, or it is not read."""
    for name in names:
        if PurePath(name).anchor or ".." in PurePath(name).parts:
            expected = f"names relative to {path}, of what is in it"
            raise ValueError(explain(f"{source} leads out of the folder.", repr(name), expected))


def _place_of(filename: str, label: str, path: Path, source: str) -> Path:
    # Together or by class, beside the split file or in the folder `images`: all are around.
    candidates = [path / base / filename for base in ("", "images", label, f"images/{label}")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    expected = f"one of {', '.join(map(str, candidates))}"
    raise ValueError(explain(f"{source} names an image that is missing.", filename, expected))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # with the mark in front that Excel and Notepad write
    except UnicodeDecodeError as error:
        expected = "text in UTF-8, as which editors can save it"
        raise ValueError(explain(f"{file} cannot be read.", str(error), expected)) from error
