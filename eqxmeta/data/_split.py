"""Which images of a folder are meant, and of what class each is."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from .._arguments import check_path
from .._errors import explain
from ._listing import (
    IMAGE_SUFFIXES,
    Entries,
    check_below,
    entries_in,
    entries_of,
    listed_images,
    refuse_images,
)

_SPLIT_SUFFIXES = (".csv", ".txt", ".json")
_ALL = "all"

# What splits are called: train, val2017, meta_test, Validation, ...
_SPLIT = re.compile(
    r"(meta[-_ ]?)?(train(ing|val)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?)"
    r"([-_ ]?(set|split|data|images|\d+))?",
    re.IGNORECASE,
)


def images_by_class(path: Path, split: Any) -> dict[str, list[Path]]:
    """The image files of each class, both in sorted order; no class is empty. See `from_folder`."""
    if split is None:
        named = (file for file in path.iterdir() if file.suffix in _SPLIT_SUFFIXES)
        _refuse_splits([file for file in named if _SPLIT.fullmatch(file.stem)], path)
        return _in_class_folders(path, splits=False)
    if not isinstance(split, str | Path):
        return _named(entries_of(split, "`split`"), path, "`split`")
    split = check_path(split, "from_folder(split=...)")
    file = _split_file(path, split)
    if file is None and split == Path(_ALL):
        return _in_class_folders(path, splits=True)
    if file is None:
        return _in_class_folders(path / split, splits=False)
    return _named(entries_in(file), path, str(file))


def together(found: Sequence[dict[str, list[Path]]]) -> dict[str, list[Path]]:
    """The classes of several folders: those of one name are one class. Raises `ValueError` for an
    image that is in two classes; one that is in a class twice is one."""
    classes: dict[str, dict[str, Path]] = {}
    places: dict[str, str] = {}
    files = [(name, file) for part in found for name, images in part.items() for file in images]
    for name, file in files:
        place = os.path.realpath(file)
        if (other := places.setdefault(place, name)) != name:
            message = "`from_folder(path=...)` puts an image into two classes."
            received = f"{file} of {other!r} and of {name!r}"
            raise ValueError(explain(message, received, "folders of which none holds another"))
        classes.setdefault(name, {}).setdefault(place, file)
    return {name: list(images.values()) for name, images in sorted(classes.items())}


def _named(entries: Entries, path: Path, source: str) -> dict[str, list[Path]]:
    """What names of classes, or pairs of an image and its class, stand for in `path`."""
    if entries.pairs:
        return listed_images(entries.pairs, path, source)
    return _chosen(entries.names, path, source)


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
    refuse_images(names, path, source)
    check_below(names, path, source)
    # One class by two names, such as `a` and `./a`, is one.
    distinct = {PurePath(name).as_posix() for name in names}
    found = {name: _images_in(path / name) for name in distinct}
    for name in distinct:  # a folder of classes stands for all of them
        if not found[name] and any(map(os.path.isdir, _entries(path / name))):
            del found[name]
            below = _in_class_folders(path / name, splits=False)
            found |= {f"{name}/{inner}": images for inner, images in below.items()}
    found = dict(sorted(found.items()))
    missing = [name for name, images in found.items() if not images]
    if missing or not found:
        message = f"{source} names classes of which {path} has no images."
        received = f"{missing[:5]}, {len(missing)} of {len(found)} classes"
        expected = "the names of folders in it, one or more, each with images or with such folders"
        raise ValueError(explain(message, received, expected))
    return found


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def _entries(folder: Path) -> list[str]:
    return [entry.path for entry in os.scandir(folder)] if folder.is_dir() else []
