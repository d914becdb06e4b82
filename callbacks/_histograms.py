"""A callback that logs the distribution of parameters."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from eqxmeta._arguments import check_int
from eqxmeta._callback.callback import Callback
from eqxmeta._callback.published import Histogram
from eqxmeta._callback.run import Run


class Histograms(Callback):
    """Logs how the meta-parameters are distributed, at multiples of `every`.

    One histogram for each field of `TrainState.model` that holds floating-point arrays, as
    `parameters/<field>`: of `MetaSGD` these are `parameters/model` and `parameters/extra`. (For
    a model without fields it is one, `parameters`.) `TensorBoard` draws them.

    Raises `TypeError` or `ValueError` for an `every` that is not a positive integer.
    """

    logs = ()

    def __init__(self, *, every: int, name: str | None = None):
        self.every = check_int(every, "Histograms(every=...)", minimum=1, what="outer steps")
        self.name = name

    def on_step_end(self, run: Run) -> None:
        flat = {name: _flat(part) for name, part in _parts(run.state.model).items()}
        run.log({name: Histogram(values) for name, values in flat.items() if values.size})


def _parts(model: PyTree) -> dict[str, Any]:
    if not dataclasses.is_dataclass(model):
        return {"parameters": model}
    names = [field.name for field in dataclasses.fields(model)]
    return {f"parameters/{name}": getattr(model, name) for name in names}


def _flat(tree: PyTree) -> np.ndarray:
    """All numbers of `tree`, of complex ones their absolute values."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    leaves = [np.abs(x) if np.iscomplexobj(x) else x for x in leaves]
    return np.concatenate([np.zeros(0), *(np.asarray(x, np.float64).ravel() for x in leaves)])
