"""What a strategy, a model or a task source is, in plain text that reads the same in every process:
by which a resumed run knows its own."""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._direction import Directed
from .._meta_gradient.inner_loop import InnerLoop
from .array_facts import array_fact

# Of more plain values than these, such as the names of files, a digest is enough.
_MANY = 50

# A function may write to these at any time, so that they do not tell what it is.
_CHANGING = list | dict | set | bytearray


def fingerprint(tree: PyTree, *, values: bool) -> dict[str, str]:
    """By key path, what in `tree` can be named: the classes of its parts, its plain values, and its
    functions.

    A function is told by its name, a lambda by its code; and both, like an object with `__call__`,
    by what they hold and no call changes: numbers, texts, tuples, modules and other functions, such
    as the rate of an optax optimizer. (In brackets in the key path.) The outer optimizer, a field
    `optimizer`, is told by its functions without their numbers: a resumed run may have another
    rate.

    `values`: of an array also shape, dtype and what is in it; else nothing, for the arrays of a
    model are what is trained.
    """
    return dict(_facts(tree, "", values, ()))


def is_held(path: str) -> bool:
    """Whether the fact at `path` is of what a function holds. Another version of its library, or of
    Python, may hold it in another way."""
    return "(" in path


def _facts(x: Any, path: str, values: bool | None, above: tuple[int, ...]) -> Iterable[Any]:
    """`values`: `None` if only the names of classes and functions are told."""
    x = _unwrapped(x.loss if isinstance(x, Directed) else x)  # what it declares is not computed
    if _is_array(x):
        if values:
            yield path, array_fact(x)
        return
    parts = None if id(x) in above else _parts(x)
    if parts is None or isinstance(x, types.FunctionType):
        if values is not None or callable(x):
            yield path, _plain(x)
    else:
        yield path, type(x).__name__
    parts = parts or {}
    if len(parts) > _MANY and all(_is_plain(part) for part in parts.values()):
        if values is not None:
            told = sorted((name, _plain(part)) for name, part in parts.items())
            digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
            yield f"{path}[...]", digest
        return
    for name, part in parts.items():
        outer = name == ".optimizer" and not isinstance(x, InnerLoop)
        yield from _facts(part, f"{path}{name}", None if outer else values, (*above, id(x)))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_plain(x: Any) -> bool:
    x = _unwrapped(x)
    return not _is_array(x) and _parts(x) is None


def _unwrapped(x: Any) -> Any:
    """What `jax.jit`, `eqx.filter_jit` and their like have wrapped, in ways of their own."""
    for _ in range(9):
        wraps = callable(x) and inspect.getattr_static(x, "__wrapped__", None) is not None
        if not wraps or isinstance(x, types.FunctionType):
            break
        x = getattr(x, "__wrapped__")  # noqa: B009
    return x


def _parts(x: Any) -> dict[str, Any] | None:
    """What `x` is made of, by the end of a key path; `None` if it is one thing."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):  # as every Equinox module is
        names = [field.name for field in dataclasses.fields(x)]
        return {f".{name}": getattr(x, name) for name in names if hasattr(x, name)}
    if isinstance(x, functools.partial):
        return {".func": x.func, ".args": x.args, ".keywords": x.keywords}
    if inspect.ismethod(x):
        return {".__func__": x.__func__, ".__self__": x.__self__}
    if isinstance(x, Mapping):
        return {f"[{_plain(key)}]": x[key] for key in x}
    if isinstance(x, tuple | list):
        names = getattr(x, "_fields", None)
        return {f".{names[i]}" if names else f"[{i}]": part for i, part in enumerate(x)}
    if isinstance(x, types.FunctionType):
        return _held_by_function(x) or None
    if callable(x) and not isinstance(x, type) and not isinstance(x, enum.Enum):
        held = getattr(x, "__dict__", {})
        return {f"({name})": held[name] for name in held if _is_kept(name, held[name])} or None
    return None


def _held_by_function(x: types.FunctionType) -> dict[str, Any]:
    held: dict[str, Any] = {}
    if x.__name__ == "<lambda>":
        held["code"] = _code(x.__code__)
    for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # of one that is still empty
            held[name] = cell.cell_contents
    for name, parameter in inspect.signature(x, follow_wrapped=False).parameters.items():
        # Not None, which says nothing, and not where a decorator hides what it works with.
        told = parameter.default is not None and parameter.default is not parameter.empty
        if told and not name.startswith("_"):
            held[name] = parameter.default
    if hasattr(x, "__wrapped__"):
        held["wrapped"] = getattr(x, "__wrapped__")  # noqa: B009
    # What optax's optimizers hold they do not write to.
    of_optax = x.__module__ is not None and x.__module__.startswith("optax.")
    return {f"({k})": held[k] for k in held if of_optax or not isinstance(held[k], _CHANGING)}


def _is_kept(name: str, value: Any) -> bool:
    return not name.startswith("_") and not isinstance(value, _CHANGING)


def _code(code: types.CodeType) -> str:
    """What a lambda computes: names and constants to be read, all of it as a digest."""
    constants = [x for x in code.co_consts if not isinstance(x, types.CodeType)]
    inner = [_code(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    told = [*code.co_names, *(_plain(x) for x in constants if x is not None)]
    everything = repr((code.co_code.hex(), told, inner)).encode()
    return f"{' '.join(told)} #{hashlib.sha256(everything).hexdigest()[:8]}"


def _plain(x: Any) -> str:
    if isinstance(x, enum.Enum):  # whose value may be anything
        return f"{type(x).__qualname__}.{x.name}"
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | np.dtype):
        return repr(x)
    if isinstance(x, set | frozenset):  # whose order is another in every process
        return f"{{{', '.join(sorted(map(_plain, x)))}}}"
    if isinstance(x, tuple):
        return f"({', '.join(map(_plain, x))})"
    # Of a function and a class; else that of its class, for what an object prints of itself may be
    # where in memory it is.
    x = _unwrapped(x)
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    return name if isinstance(name, str) else type(x).__qualname__
