"""Checkpoints of pytrees: the arrays go to a file, everything else stays with the code."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._arguments import check_argument, check_file, check_json, check_path
from .._errors import CheckpointMismatch, explain, printable
from .._files.paths import drop_cached
from .._model.averaged import AVERAGED
from .._model.state import TrainState
from . import container as _container
from .dtypes import DTYPES, KEY_BITS, dtype_of, is_key, name_of_key, names_key, stored_dtype
from .manifest import library_versions
from .names import refuse_folder
from .statistics import expecting_statistics


def save(path: str | os.PathLike[str], tree: PyTree, *, meta: dict[str, Any] | None = None) -> None:
    """Save the arrays of `tree` (a model, a `TrainState`, any pytree), and `meta`, to one file.

    Stored are JAX and NumPy arrays of any dtype that JAX has, and typed PRNG keys; other leaves are
    left to `load`'s `like`. `meta` holds JSON values (NaN and infinities included; a tuple returns
    as a list). Whatever happens while the file is written, `path` keeps its previous content.

    Raises `TypeError` for an array of another dtype or without values (`ShapeDtypeStruct`) and for
    a `meta` that is not JSON, `ValueError` if `meta` and the description of the leaves are more
    than 8 MB, `FileNotFoundError` if the folder does not exist, and another `OSError` if there
    cannot be a file at `path`.
    """
    write_tree(check_path(path, "save(path=...)"), tree, {} if meta is None else meta)


def write_tree(
    path: Path, tree: PyTree, meta: dict[str, Any], before: Callable[[], object] = lambda: None
) -> None:
    """As `save`; `before` is called when the file has all but its name, and may still raise."""
    check_argument(isinstance(meta, dict), meta, "meta", "a dict of JSON values", TypeError)
    check_json(meta, "meta", 0)
    if not path.parent.is_dir():
        message, received = f"Cannot save to {path}.", "a folder that does not exist"
        raise FileNotFoundError(explain(message, received, "an existing folder"))
    check_file(path, "save(path=...)")
    leaves = array_leaves(tree)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            received, expected = "a `ShapeDtypeStruct`", "an array: a tree of shapes is for `load`"
            raise TypeError(explain(f"The leaf {name!r} has no values.", received, expected))
    # All of them before any is written, so that a wrong dtype is refused at once.
    entries = [(_entry(name, leaf), leaf) for name, leaf in leaves.items()]
    stored = ((entry, _to_numpy(leaf)) for entry, leaf in entries)
    _container.write(path, stored, {"versions": library_versions(), "meta": meta}, before)


def on_host(tree: PyTree) -> PyTree:
    """`tree` with its arrays as NumPy arrays, which can be saved later, and on another thread.
    Typed PRNG keys, which NumPy does not have, stay."""
    return jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) and not is_key(x) else x, tree)


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """`like`, with its arrays replaced by those of the file, as JAX arrays.

    Of `like` only shapes and dtypes are looked at, so that it may be what
    `eqx.filter_eval_shape(make_model)` returns, without an array in it.

    Every byte is checked. What JAX cannot hold at present (float64 without `jax_enable_x64`) comes
    as a NumPy array rather than rounded.

    Raises `CheckpointNotFound`, `CheckpointCorrupt` (any damage), `CheckpointTooNew`, and
    `CheckpointMismatch` if `like` has not the same array leaves, by key path, shape and dtype. What
    `inner_adapt` returned is loaded into what it returned; into a model as it was before by
    `load_model`, which brings the statistics of the support set along.
    """
    return load_below(check_path(path, "load(path=...)"), like, "", "`like`")


def load_state(path: Path, like: TrainState, whose: str = "this run") -> TrainState:
    """The state of a run, as `load`; `like` is the state that the run begins with."""
    return load_below(path, like, "", whose)


def load_below(path: Path, like: PyTree, prefix: str, whose: str) -> PyTree:
    """`like` from the leaves of the file whose key path begins with `prefix`, and none besides;
    `whose` it is, for the error."""
    refuse_folder(path)
    leaves = {prefix + name: leaf for name, leaf in array_leaves(like).items()}
    wanted = {name: _entry(name, leaf) for name, leaf in leaves.items()}
    with _container.reading(path) as reader:
        entries = reader.manifest["leaves"]
        found = {e["path"]: e for e in entries if is_below(prefix, e["path"])}
        if isinstance(like, TrainState):
            found = {name: e for name, e in found.items() if not is_below(AVERAGED, name)}
        _check_same(path, like, wanted, found, whose)
        arrays = [
            _to_jax(reader.array(found[name], *_stored_form(leaf)), leaf)
            for name, leaf in leaves.items()
        ]
    loaded = iter(arrays)
    return jax.tree.map(lambda leaf: next(loaded) if _is_array(leaf) else leaf, like)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself: `"format"`, `"versions"`, `"meta"`, and `"leaves"`, each
    with its key path, shape, dtype, size and sha256.

    The manifest is checked, the arrays are not read: `load` does that.
    Raises `CheckpointNotFound`, `CheckpointCorrupt`, `CheckpointTooNew`.
    """
    refuse_folder(Path(path))
    with _container.reading(Path(path)) as reader:
        return reader.manifest


def verify(path: str | os.PathLike[str]) -> None:
    """Read the whole file, from the disk if possible. Raises `CheckpointCorrupt` if any of it is
    not what was written."""
    drop_cached(Path(path))
    with _container.reading(Path(path)) as reader:
        for entry in reader.manifest["leaves"]:
            reader.check(entry)


def read_alone(reader: _container.Reader, entry: dict[str, Any]) -> np.ndarray | None:
    """A leaf without a `like`: what the manifest says of it is checked too. `None` for PRNG keys,
    whose bits mean nothing. Raises `CheckpointCorrupt`."""
    if names_key(entry["dtype"]):
        reader.check(entry)
        return None
    dtype = dtype_of(entry["dtype"])
    return reader.array(entry, tuple(entry["shape"]), stored_dtype(dtype)).view(dtype)


def is_below(prefix: str, name: str) -> bool:
    rest = name.removeprefix(prefix)
    return name.startswith(prefix) and (not prefix or rest[:1] in ("", ".", "["))


def array_leaves(tree: PyTree) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_array(leaf):
            name = jax.tree_util.keystr(path)
            if name in leaves:
                message = "The pytree has leaves of one name."
                raise ValueError(explain(message, f"{name!r} twice", "unique paths"))
            leaves[name] = leaf
    return leaves


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _entry(name: str, leaf: Any) -> dict[str, Any]:
    if is_key(leaf):
        dtype = name_of_key(_key_form(leaf)[0])
    else:
        dtype = leaf.dtype.name
        if dtype not in DTYPES:
            message = f"The leaf {name!r} cannot be stored."
            expected = "an array of a dtype that JAX has: numbers, booleans or PRNG keys"
            raise TypeError(explain(message, f"an array of dtype {dtype}", expected))
    return {"path": name, "shape": list(leaf.shape), "dtype": dtype}


def _key_form(keys: Any) -> tuple[Any, tuple[int, ...]]:
    """The generator of `keys`, which may be shapes alone, and the shape of their bits."""
    impl = []

    def data(keys: Any) -> Any:
        impl.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    bits = jax.eval_shape(data, keys)
    return impl[0], bits.shape


def _stored_form(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype in the file."""
    if is_key(leaf):
        return _key_form(leaf)[1], KEY_BITS
    return leaf.shape, stored_dtype(np.dtype(leaf.dtype))


def _to_numpy(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf, order="C")
    return array.view(stored_dtype(array.dtype))


def _to_jax(array: np.ndarray, like: Any) -> Any:
    # JAX may use the memory as it is, and overwrite it when donated: nobody else has it.
    if is_key(like):
        return jax.random.wrap_key_data(jax.device_put(array), impl=_key_form(like)[0])
    if like.dtype.isbuiltin == 2:
        array = array.view(like.dtype)
    fits = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jax.device_put(array) if fits else array


def _holds_model(like: PyTree, wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether `load_model` finds such a model in the file, of a run or with statistics."""
    for prefix in (".model.model", ".model"):
        if {f"{prefix}{name}" for name in wanted} == {k for k in found if is_below(prefix, k)}:
            return True
    return array_leaves(expecting_statistics(like, found)).keys() == found.keys() != wanted.keys()


def _check_same(
    path: Path, like: PyTree, wanted: dict[str, Any], found: dict[str, Any], whose: str
) -> None:
    def form(entry: dict[str, Any]) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    lines = {
        **{k: f"only in the file: {k} {form(v)}" for k, v in found.items() if k not in wanted},
        **{k: f"only in {whose}: {k} {form(v)}" for k, v in wanted.items() if k not in found},
        **{
            k: f"different: {k} is {form(found[k])} in the file, {form(v)} in {whose}"
            for k, v in wanted.items()
            if k in found and form(v) != form(found[k])
        },
    }
    if not lines:
        return
    lines = {k: printable(line) for k, line in lines.items()}
    # An optimizer keeps arrays for each of the model's, which differ for the same reason.
    first = [line for k, line in lines.items() if not is_below(".opt_state", k)]
    shown = first[:40] or list(lines.values())[:40]
    if len(lines) > len(shown):
        of_optimizer = ", of the optimizer's state for one" if first else ""
        shown.append(f"and {len(lines) - len(shown)} more{of_optimizer}")
    message = f"Checkpoint {path} does not have the array leaves of {whose}."
    expected = "the same leaves: the model, strategy and optimizer with which it was saved"
    if _holds_model(like, wanted, found):
        expected = f"the same leaves, or `eqxmeta.load_model('{path}', like)`: it has such a model"
    elif whose == "`like`":
        expected += "; of what `inner_adapt` returned, something else that it returned"
    raise CheckpointMismatch(explain(message, "\n  " + "\n  ".join(shown), expected))
