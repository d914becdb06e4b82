"""Checks of arguments that many public names share. Each raises before anything is traced."""

import math
import numbers
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._errors import explain
from ._types import Number


def check_argument(
    valid: object,
    value: object,
    argument: str,
    expected: str,
    error: type[Exception] = ValueError,
    fault: str = "is invalid",
) -> None:
    """Raises `error`, naming the `argument` and its `fault`, unless its `value` is `valid`."""
    if not valid:
        raise error(explain(f"`{argument}` {fault}.", repr(value)[:500], expected))


def check_choice(
    value: object, argument: str, choices: tuple[str, ...], fault: str = "is invalid"
) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    sound = isinstance(value, str) and value in choices
    *others, last = map(repr, choices)
    expected = f"{', '.join(others)} or {last}"
    check_argument(sound, value, argument, expected, ValueError, fault)


def check_int(value: Any, argument: str, *, minimum: int, what: str) -> int:
    """`value` as Python's integer; NumPy's would be an array to JAX, and is not JSON.

    `TypeError` unless it is an integer, `ValueError` if it is below `minimum`."""
    expected = f"an integer, {minimum} or more {what}"
    check_argument(_is_int(value), value, argument, expected, TypeError, "is not an integer")
    check_argument(value >= minimum, value, argument, expected, ValueError, "is too small")
    return int(value)


def check_int_or_none(value: Any, argument: str, *, minimum: int, what: str) -> int | None:
    """As `check_int`, for an argument that may be `None`."""
    what = f"{what}, or None"
    return None if value is None else check_int(value, argument, minimum=minimum, what=what)


def check_seed(value: Any, argument: str) -> int:
    """A seed is an integer that every platform's generator takes; a key is not a seed."""
    expected = "an integer from 0 to 2**32 - 1"
    check_argument(_is_int(value), value, argument, expected, TypeError, "is not a seed")
    sound = 0 <= int(value) < 2**32
    check_argument(sound, value, argument, expected, ValueError, "is out of range")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# `gs://bucket/run`, which `Path` makes `gs:/bucket/run` of; not `C:/`.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_path(value: Any, argument: str) -> Path:
    """`value` as a path, with `~` as the home that it stands for: for every path that a user gives.

    Raises `TypeError`, and `ValueError` for what would be another place than is meant: a URL, the
    home of nobody, nothing; or a character that no path has."""
    sound = isinstance(value, str | os.PathLike) and not isinstance(os.fspath(value), bytes)
    check_argument(sound, value, argument, "a path: a string or a `Path`", TypeError)
    path = os.fspath(value)
    check_argument("\0" not in path, path, argument, "a path without the character NUL")
    halves = re.search("[\ud800-\udc7f\udd00-\udfff]", path)  # the others stand for odd bytes
    check_argument(not halves, path, argument, "a path without halves of surrogate pairs")
    expected = "a path of this machine: a folder where the bucket is mounted (gcsfuse, s3fs), or "
    expected += "any, to be copied by the bucket's own tool; of file:// the path behind it"
    check_argument(not _URL.match(path), path, argument, expected, fault="is a URL")
    check_argument(path, path, argument, "a path that is not empty; of here '.'", fault="is empty")
    home = os.path.expanduser(path)
    expected = "`~` or `~name` of a user whom this machine knows; './~' is a file of that name"
    fault = "begins with the home of nobody"
    check_argument(home[0] != "~", path, argument, expected, fault=fault)
    return Path(home)


def place_of(path: Any, argument: str) -> Path:
    """Where `path` is when a run begins: what the run writes is there to its end, whatever folder
    the program works in by then."""
    return check_path(path, argument).absolute()


# Bytes: of a name and a path, as Linux and macOS have them; and what the names of our locks,
# temporaries and `.stale-12` have more than the file that they are for.
_LONGEST_NAME, _LONGEST_PATH, _BESIDE = 255, 1023 if sys.platform == "darwin" else 4095, 16


def _check_length(name: str | Path, argument: str, longest: int, what: str) -> None:
    size = len(os.fsencode(name))
    if size > longest:
        received = f"a {what} of {size:,} bytes: {str(name)[:60]}..."
        raise OSError(explain(f"`{argument}` is too long.", received, f"{longest:,} bytes or less"))


def check_folder(folder: Path, argument: str) -> None:
    """Raises `OSError` if there cannot be a folder at `folder` to write into. Leaves no trace."""
    for name in folder.parts:
        _check_length(name, argument, _LONGEST_NAME, "name")
    _check_length(folder.absolute(), argument, _LONGEST_PATH - 1 - _LONGEST_NAME, "path")
    expected = "a folder, or a path at which one can be made, that can be written to"
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        message = explain(f"`{argument}` is not a folder.", f"a file: {above}", expected)
        raise NotADirectoryError(message)
    if not os.access(above, os.W_OK | os.X_OK) or _is_virtual(above):
        message = explain(f"`{argument}` cannot be written.", f"{folder}, in {above}", expected)
        raise PermissionError(message)


def check_file(path: Path, argument: str) -> None:
    """Raises `OSError` if there cannot be a file at `path` to write into, nor what is written
    beside it meanwhile. Leaves no trace."""
    for name in (path.name, os.path.basename(os.path.realpath(path))):
        _check_length(name, argument, _LONGEST_NAME - _BESIDE, "name")
    if os.path.isdir(path):  # as opposed to the methods of `Path`, these never raise
        received = f"a folder: '{path}'"
        raise IsADirectoryError(explain(f"`{argument}` is a folder.", received, "a file"))
    # A device or a pipe would be replaced by a file.
    if os.path.exists(path) and not os.path.isfile(path):
        received = f"'{path}', which is a device, a pipe or a socket"
        raise OSError(explain(f"`{argument}` is no file.", received, "a file"))
    check_folder(path.absolute().parent, argument)


def _is_virtual(folder: Path) -> bool:
    # Of a file system that the kernel makes up, the access rights of root say nothing.
    return folder.absolute().parts[1:2] in (("proc",), ("sys",))


def check_number(value: Any, argument: str, *, positive: bool = False) -> Number:
    """`value` as Python's float. Raises `ValueError` unless it is a real, finite number.

    What JAX traces is returned as it is: `fit_grid` has checked the numbers that it stands for."""
    if isinstance(value, Tracer) and jnp.ndim(value) == 0:
        return value
    sound = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    sound = sound and (float(value) > 0 or not positive)
    check_argument(sound, value, argument, f"a {'positive, ' * positive}finite number")
    return float(value)


def check_optimizer(optimizer: object, argument: str) -> None:
    """An optax optimizer is meant: a class, a learning rate or a strategy is not one."""
    sound = isinstance(optimizer, optax.GradientTransformation)
    expected = "an `optax.GradientTransformation`, for example `optax.sgd(0.01)`"
    if hasattr(optimizer, "gradient_transformation"):  # `optax.MultiSteps`
        expected = "an `optax.GradientTransformation`: its `.gradient_transformation()`"
    check_argument(sound, optimizer, argument, expected, TypeError)


def check_json(value: Any, where: str, depth: int) -> None:
    """Raises `TypeError`, naming the place, unless `value` is what JSON has."""
    if depth > 100:
        raise TypeError(explain(f"`{where[:60]}...` is too deep.", "100 levels", "JSON values"))
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(explain(f"A key of `{where}` is not JSON.", repr(key), "a string"))
            check_json(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        expected = "None, a bool, int, float or str, or a list or dict of these"
        check_argument(False, value, where, expected, TypeError)


def native(x: np.ndarray) -> np.ndarray:
    """Floats as JAX takes them: in this machine's order of bytes, and of 64 bits at most. Others,
    and those that are so, come back as they are."""
    if x.dtype.kind != "f":
        return x
    kind = x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.dtype(np.float64)
    return x.astype(kind, copy=False)
