"""The statistics of a support set in a file, for layers that had none before they adapted."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._model.support_statistics import SupportLayer


def expecting_statistics(like: PyTree, entries: Mapping[str, Any]) -> PyTree:
    """`like`, with shapes for the statistics of those layers that have some in a file, of which
    `entries` are the leaves by key path; the other layers have none."""

    def of_layer(path: tuple[Any, ...], x: Any) -> Any:
        if not _is_layer(x):
            return x
        where, found = f"{jax.tree_util.keystr(path)}.statistics", []
        while (entry := entries.get(f"{where}[{len(found)}]")) is not None:
            shape = tuple(entry["shape"])
            found.append(jax.ShapeDtypeStruct(shape, jnp.dtype(entry["dtype"])))
        statistics = tuple(found) or None
        return eqx.tree_at(lambda x: x.statistics, x, statistics, is_leaf=lambda x: x is None)

    return jax.tree_util.tree_map_with_path(of_layer, like, is_leaf=_is_layer)


def _is_layer(x: Any) -> bool:
    return isinstance(x, SupportLayer)
