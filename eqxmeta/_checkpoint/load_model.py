"""A model out of a file, for use without a trainer."""

import os

from jaxtyping import PyTree

from .._arguments import check_path
from .._model.averaged import AVERAGED
from .save_load import array_leaves, is_below, load_below, read_manifest
from .statistics import expecting_statistics


def load_model(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """The model in a run's checkpoint (or a saved `TrainState`), or one that was saved by itself,
    for use without a trainer: `like`, a model of the same structure, with the arrays of the file.

        em.save(path, strategy.inner_adapt(state.model, support))
        adapted = em.load_model(path, model)

    If the run's strategy wraps the model in a module with a field `.model` (one that learns its
    rates too, say), then `like` may be the user's own model or the wrapped one: it is told by its
    leaves. Where `Checkpoint(model=...)` has saved an average beside the state, it is that one.
    A model that had adapted when it was saved comes with the statistics of its support set
    (`eqxmeta.nn.SupportNorm`), ready for queries, whether `like` has any or not.

    Raises what `load` raises.
    """
    path = check_path(path, "load_model(path=...)")
    found = {entry["path"]: entry for entry in read_manifest(path)["leaves"]}
    wanted = array_leaves(expecting_statistics(like, {})).keys()
    # The innermost in which everything is to be found; else the outermost, whose error tells most.
    places = (f"{AVERAGED}.model", AVERAGED, ".model.model", ".model", "")
    prefix = next((p for p in places if {p + name for name in wanted} <= found.keys()), None)
    if prefix is None:
        prefix = ".model" if any(is_below(".model", name) for name in found) else ""
    below = {name.removeprefix(prefix): x for name, x in found.items() if is_below(prefix, name)}
    return load_below(path, expecting_statistics(like, below), prefix, "`like`")
