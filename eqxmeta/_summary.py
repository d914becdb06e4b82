"""What a run is, in plain values and in a few lines for the terminal."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._callback import Callback, name_of
from ._model import count_parameters
from ._state import TrainState
from ._strategy import Strategy


def describe(
    strategy: Strategy,
    model: PyTree,
    state: TrainState,
    tasks: Any,
    *,
    steps: int,
    seed: int,
    meta_batch_size: int,
) -> dict[str, Any]:
    """The run as plain values: for hyper-parameters, and for a checkpoint to be compared with."""
    inner = getattr(strategy, "inner", None)
    return {
        "strategy": type(strategy).__name__,
        "inner_steps": getattr(inner, "steps", None),
        "gradient": getattr(inner, "gradient", None),
        "meta_batch_size": meta_batch_size,
        "seed": seed,
        "steps": steps,
        "model": type(model).__name__,
        "parameters": count_parameters(model),
        "meta_parameters": count_parameters(state.model),
        "tasks": _name(tasks),
    }


def render(
    config: dict[str, Any],
    callbacks: Iterable[Callback],
    left_out: Iterable[Callback] = (),
    *,
    start: int,
) -> str:
    """A few lines for the terminal. `left_out`: the callbacks that a trial run does without."""
    inner = ""
    if config["inner_steps"] is not None:
        inner = f", {config['inner_steps']} inner step{'s' * (config['inner_steps'] != 1)}"
    resumed = f", resumed at step {start:,}" if start else ""
    names = ", ".join(name_of(callback) for callback in callbacks) or "none"
    without = ", ".join(name_of(callback) for callback in left_out)
    names += f" (left out, for they write files: {without})" if without else ""
    return "\n".join(
        (
            f"strategy    {config['strategy']}{inner}",
            f"model       {config['model']}, {config['parameters']:,} parameters",
            f"learns      {config['meta_parameters']:,} meta-parameters",
            f"meta-batch  {config['meta_batch_size']} tasks a step",
            f"run         {config['steps']:,} steps, seed {config['seed']}{resumed}",
            f"callbacks   {names}",
        )
    )


def _name(tasks: Any) -> str:
    # Modules print the same in every process; other objects print where in memory they are.
    return (
        " ".join(repr(tasks).split())[:500]
        if isinstance(tasks, eqx.Module)
        else type(tasks).__name__
    )
