"""Which images of a folder are meant, and of what class each is."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from .._arguments import check_argument, check_path
from .._errors import explain

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm")
_IMAGE = re.compile(rf"[\s\"']*(.+?({'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\b", re.IGNORECASE)
_SPLIT_SUFFIXES = (".csv", ".txt", ".json")
_ALL = "all"

# What splits are called: train, val2017, meta_test, Validation, ...
_SPLIT = re.compile(
    r"(meta[-_ ]?)?(train(ing|val)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?)"
    r"([-_ ]?(set|split|data|images|\d+))?",
    re.IGNORECASE,
)


def images_by_class(path: Path, split: str | Path | Sequence[str] | None) -> dict[str, list[Path]]:
    """The image files of each class, both in sorted order; no class is empty. See `from_folder`."""
    if split is None:
        named = (file for file in path.iterdir() if file.suffix in _SPLIT_SUFFIXES)
        _refuse_splits([file for file in named if _SPLIT.fullmatch(file.stem)], path)
        return _in_class_folders(path, splits=False)
    if not isinstance(split, str | Path):
        return _chosen(_class_folder_names(split), path, "`split`")
    split = check_path(split, "from_folder(split=...)")
    file = _split_file(path, split)
    if file is None and split == Path(_ALL):
        return _in_class_folders(path, splits=True)
    if file is None:
        return _in_class_folders(path / split, splits=False)
    if file.suffix == ".csv":
        return _listed(file, path)
    return _chosen(_class_names(file), path, str(file))


def _split_file(path: Path, split: Path) -> Path | None:
    """The file that says what is in the split, or `None` if that is a folder's business."""
    if split.suffix in _SPLIT_SUFFIXES:
        candidates = [path / split, split]
    else:
        candidates = [path / f"{split}{suffix}" for suffix in _SPLIT_SUFFIXES]
    files = {c.resolve(): c for c in candidates if c.is_file()}  # one by two names is one
    found = [*files.values(), *[path / split] * (path / split).is_dir()]
    found += [path] * (split == Path(_ALL))
    if not found:
        where = ", ".join(map(str, dict.fromkeys([*candidates, path / split])))
        there = sorted(p.name for p in path.glob("*") if _SPLIT.fullmatch(p.stem))
        expected = f"one of {where}" + f"; or of what is there: {', '.join(there)}" * bool(there)
        raise FileNotFoundError(explain("`split` was not found.", repr(str(split)), expected))
    if len(found) > 1:
        received = f"{str(split)!r}, and there are {', '.join(map(str, found))}"
        expected = (
            "one of them: the whole path of the file, as `split`; or of the folder, as `path`"
        )
        raise ValueError(explain("`split` may mean several things.", received, expected))
    return found[0] if files else None


def _in_class_folders(path: Path, *, splits: bool) -> dict[str, list[Path]]:
    """Every folder at or below `path` that holds images is a class, named by its relative path.
    `splits`: also those of several splits, together."""
    found: dict[str, list[Path]] = {}
    above = {os.fspath(path): {os.path.realpath(path)}}  # what leads to a folder, and itself
    # Links are followed: that is how large data sets are shared.
    for folder, subfolders, _ in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            inside = os.path.join(folder, name)
            above[inside] = above[folder] | {_not_back(inside, above[folder])}
        images = _images_in(Path(folder))
        name = Path(folder).relative_to(path).as_posix()
        if images and name == ".":
            message = f"{path} holds images that belong to no class."
            received = f"{images[0].name} and {len(images) - 1} more outside of class folders"
            expected = "one folder a class, or a csv file of filename and label as `split`"
            raise ValueError(explain(message, received, expected))
        if images:
            found[name] = images
        elif not subfolders:
            expected = f"images ({' '.join(IMAGE_SUFFIXES)}) in every class folder"
            raise ValueError(explain(f"{folder} is empty.", "a folder without images", expected))
    if not splits:
        _refuse_splits(_split_folders(found, path), path)
    return dict(sorted(found.items()))


def _split_folders(classes: Iterable[str], path: Path) -> set[Path]:
    """The folders of splits: those with classes in them, and those with images that have the like
    beside them. (One alone may be a class: CIFAR-100 has trains.)"""
    named = {
        (path / folder, folder == PurePath(name))
        for name in classes
        for folder in (PurePath(name), *PurePath(name).parents)
        if _SPLIT.fullmatch(folder.name)
    }
    parents = [folder.parent for folder in {folder for folder, _ in named}]
    return {f for f, is_class in named if not is_class or parents.count(f.parent) > 1}


def _refuse_splits(splits: Iterable[Path], path: Path) -> None:
    """The same image may be in several splits; and what was learnt on one is tested on another."""
    splits = sorted(splits)
    if splits:
        names = ", ".join(str(split.relative_to(path)) for split in splits[:5])
        first = f"from_folder({str(splits[0].parent)!r}, split={splits[0].stem!r})"
        expected = f"`{first}`, or another of them; or split='all', all classes together"
        raise ValueError(explain(f"{path} has splits, and none is chosen.", names, expected))


def _not_back(folder: str, above: set[str]) -> str:
    """The place of `folder`, which is none of those above it: that way there is no end."""
    place = os.path.realpath(folder)
    if place in above:
        message = f"{folder} leads back to a folder that holds it."
        expected = "links to folders elsewhere; or the names of the classes, as `split`"
        raise ValueError(explain(message, f"a link to {place}", expected))
    return place


def _chosen(names: Sequence[str], path: Path, source: str) -> dict[str, list[Path]]:
    _refuse_files(names, path, source)
    _check_below(names, path, source)
    # One class by two names, such as `a` and `./a`, is one.
    distinct = sorted({PurePath(name).as_posix() for name in names})
    found = {name: _images_in(path / name) for name in distinct}
    missing = [name for name, images in found.items() if not images]
    if missing or not found:
        message = f"{source} names classes of which {path} has no images."
        received = f"{missing[:5]}, {len(missing)} of {len(found)} classes"
        expected = "the names of folders in it, one or more, each with images"
        raise ValueError(explain(message, received, expected))
    return found


def _refuse_files(names: Sequence[str], path: Path, source: str) -> None:
    """Lines such as `apple/1.jpg, 0, 3`, taken for the names of classes."""
    for name in names:
        if (match := _IMAGE.match(name)) and not (path / name).is_dir():
            image = PurePath(match[1])
            if image.anchor:  # what is listed is named as it lies in `path`
                image = PurePath(image.parent.name, image.name)
            row = f"{image},{image.parent.name or 'its class'}"
            expected = f"names of classes; or a csv file, 'filename,label' its first line, {row!r}"
            received = f"{name!r}, the first of {len(names)} lines"
            raise ValueError(explain(f"{source} names images, not classes.", received, expected))


def _listed(file: Path, path: Path) -> dict[str, list[Path]]:
    """As Ravi and Larochelle 2017 published the split of miniImageNet: `filename,label`."""
    rows = csv.DictReader(io.StringIO(_text(file)))
    if not {"filename", "label"} <= set(rows.fieldnames or ()):
        expected = "columns named filename and label: 'filename,label' as the first line, then "
        expected += "one line an image, such as 'apple/1.jpg,apple'"
        raise ValueError(explain(f"{file} is not a split.", repr(rows.fieldnames), expected))
    pairs = [(row["filename"], row["label"]) for row in rows]
    if not pairs or not all(filename and label for filename, label in pairs):
        expected = "one image or more, each with its class"
        raise ValueError(explain(f"{file} names no images.", f"{len(pairs)} lines", expected))
    _check_below([name for pair in pairs for name in pair], path, str(file))
    found: dict[str, list[Path]] = {}
    labels: dict[str, str] = {}
    for filename, label in pairs:
        image = _place_of(filename, label, file, path)
        place = os.path.realpath(image)
        if (other := labels.get(place, label)) != label:
            message = f"{file} puts an image into two classes."
            received = f"{filename} of {other!r} and of {label!r}, both {image}"
            raise ValueError(explain(message, received, "one label for each image"))
        # An image that is listed twice is one: else it could be support and query of one task.
        if place not in labels:
            found.setdefault(label, []).append(image)
        labels[place] = label
    return {label: sorted(images) for label, images in sorted(found.items())}


def _check_below(names: Sequence[str], path: Path, source: str) -> None:
    """Split files come from strangers: what they name is in `path`, or it is not read."""
    for name in names:
        if PurePath(name).anchor or ".." in PurePath(name).parts:
            expected = f"names relative to {path}, of what is in it"
            raise ValueError(explain(f"{source} leads out of the folder.", repr(name), expected))


def _place_of(filename: str, label: str, file: Path, path: Path) -> Path:
    # Together or by class, beside the split file or in the folder `images`: all are around.
    candidates = [path / base / filename for base in ("", "images", label, f"images/{label}")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    expected = f"one of {', '.join(map(str, candidates))}"
    raise ValueError(explain(f"{file} names an image that is missing.", filename, expected))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # with the mark in front that Excel and Notepad write
    except UnicodeDecodeError as error:
        expected = "text in UTF-8, as which editors can save it"
        raise ValueError(explain(f"{file} cannot be read.", str(error), expected)) from error


def _class_names(file: Path) -> list[str]:
    text = _text(file)
    if file.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return _class_folder_names(json.loads(text))
    except ValueError as error:
        expected = 'a list of class names, such as ["cat", "dog"]'
        raise ValueError(explain(f"{file} is not a split.", str(error), expected)) from error


def _class_folder_names(names: Any) -> list[str]:
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    sound = listed and all(isinstance(name, str) for name in names)
    expected = "a list of class names, or the name of a split or of its file"
    check_argument(sound, names, "split", expected, ValueError, "does not name classes")
    return list(names)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
