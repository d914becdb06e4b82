"""What a run is, in plain values and in a few lines for the terminal."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from .._callback.callback import Callback, name_of
from .._checkpoint.array_facts import array_fact
from .._checkpoint.fingerprint import fingerprint
from .._meta_gradient.inner_loop import InnerLoop
from .._model.check import count_parameters
from .._model.state import TrainState
from .._preflight.slow_layers import linear_layers
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy, partition_learnt
from .._task.mesh import default_device

# Fields of a strategy that say how something is laid out in memory, and not what is computed.
_LAYOUT = (".task_chunk", ".remat")

# Of `jax.config`, on what the numbers of a run depend.
_SETTINGS = (
    "enable_x64",
    "default_matmul_precision",
    "default_prng_impl",
    "threefry_partitionable",
    "random_seed_offset",
)


def describe(
    strategy: Strategy,
    model: PyTree,
    state: TrainState,
    tasks: Any,
    *,
    steps: int,
    seed: int,
    meta_batch_size: int,
    saves: bool,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The run as plain values: for hyper-parameters, and for a checkpoint to be compared with.

    `saves`: with the fingerprints by which a resumed run is known, for which all data is read."""
    inner = strategy.inner if isinstance(strategy, RolloutStrategy) else None
    params, rest = partition_learnt(strategy, state.model)
    return {
        "strategy": type(strategy).__name__,
        "options": _options(strategy),
        "inner_steps": strategy.num_inner_steps(),
        "gradient": getattr(inner, "gradient", None),
        "window": getattr(inner, "window", None),
        "adapts": _adapts(inner, model, state.model),
        "learns": _learns(params, rest),
        "meta_batch_size": meta_batch_size,
        "seed": seed,
        "steps": steps,
        "model": type(model).__name__,
        "parameters": count_parameters(model),
        "meta_parameters": count_parameters(params),
        "tasks": _name(tasks),
        **({"fingerprint": _fingerprints(strategy, model, state, tasks, mesh)} if saves else {}),
    }


def render(
    config: dict[str, Any],
    callbacks: Iterable[Callback],
    left_out: Iterable[Callback] = (),
    *,
    start: int,
    model: PyTree,
    mesh: Mesh | None = None,
    divided: bool = False,
) -> str:
    """A few lines for the terminal. `left_out`: the callbacks that a trial run does without;
    `divided`: whether the devices of `mesh` share the tasks."""
    slow = linear_layers(model)
    inner = ""
    if config["inner_steps"] is not None:
        inner = f", {config['inner_steps']} inner step{'s' * (config['inner_steps'] != 1)}"
    resumed = f", resumed at step {start:,}" if start else ""
    names = ", ".join(name_of(callback) for callback in callbacks) or "none"
    without = ", ".join(name_of(callback) for callback in left_out)
    names += f" (left out, for they write files: {without})" if without else ""
    adapts = [f"adapts      {_shortened(config['adapts'], 80)}"] if config["adapts"] else []
    learns = f": {_shortened(config['learns'], 60)}" if config["learns"] else ""
    return "\n".join(
        (
            f"strategy    {config['strategy']}{inner}",
            f"model       {config['model']}, {config['parameters']:,} parameters",
            *adapts,
            f"learns      {config['meta_parameters']:,} meta-parameters{learns}",
            f"meta-batch  {config['meta_batch_size']} tasks a step",
            f"run         {config['steps']:,} steps, seed {config['seed']}{resumed}",
            *_devices(config["strategy"], mesh, divided),
            f"callbacks   {names}",
            *[f"faster      model = em.nn.fast(model), for {slow} `eqx.nn.Linear`"] * bool(slow),
        )
    )


def _devices(strategy: str, mesh: Mesh | None, divided: bool) -> list[str]:
    if mesh is None:
        return []
    which = f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind}"
    if divided:
        return [f"{which}, which share the tasks of a step"]
    alone = f"`{strategy}.outer_update` takes the mean over tasks by itself"
    return [
        f"{which}, each of which computes every task:",
        f"            {alone}; `eqxmeta.mean_over_tasks` divides them",
    ]


def _options(strategy: Strategy) -> str:
    """The fields that are plain values, such as `Reptile(batch_size=...)`; not how tasks are laid
    out in memory, which is no part of what is computed."""
    fields = ((field.name, getattr(strategy, field.name)) for field in dataclasses.fields(strategy))
    plain = ((name, x) for name, x in fields if isinstance(x, bool | int | float | str))
    return ", ".join(f"{name}={x!r}" for name, x in plain if name != "task_chunk")


def _adapts(inner: InnerLoop | None, *models: PyTree) -> str | None:
    """The key paths of what adapts. `None` if everything does."""
    if inner is None or inner.adapt is None:
        return None
    fast = fast_part(inner, *models)
    return "a part that the strategy makes" if fast is None else _key_paths(fast)


def fast_part(inner: InnerLoop, *models: PyTree) -> PyTree | None:
    """What adapts, of the first of the `models` that has what `InnerLoop(adapt=...)` chooses: the
    user's, or what the strategy learns. `None` if none has; the check of the outer step tells."""
    for model in models:
        with contextlib.suppress(Exception):
            return inner.partition(model)[0]
    return None


def _learns(params: PyTree, rest: PyTree) -> str | None:
    """The key paths of what is meta-learnt; `None` if that is every parameter of the state."""
    return _key_paths(params) if count_parameters(rest) else None


def _key_paths(tree: PyTree) -> str:
    paths = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return ", ".join(path.removeprefix(".") for path in paths)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _fingerprints(
    strategy: Strategy, model: PyTree, state: TrainState, tasks: Any, mesh: Mesh | None
) -> dict[str, dict[str, str]]:
    # Of a source on the host, which may be larger than any memory, the class.
    module = isinstance(tasks, eqx.Module)
    told = fingerprint(strategy, values=True)
    return {
        "strategy": {path: fact for path, fact in told.items() if not path.endswith(_LAYOUT)},
        "jax_": {name: str(getattr(jax.config, f"jax_{name}", None)) for name in _SETTINGS},
        "model": fingerprint(model, values=False),
        "tasks": fingerprint(tasks, values=True) if module else {"": type(tasks).__name__},
        "asked": _asked_of_the_optimizer(state),
        "computed": _computed_on(mesh),
    }


def _asked_of_the_optimizer(state: TrainState) -> dict[str, str]:
    """The numbers that `optax.inject_hyperparams` keeps in the state, as the run asks for them; not
    those that a schedule makes anew at every step."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if eqx.is_array(leaf)}

    def scheduled(name: str) -> bool:
        its_state = name.replace(".hyperparams[", ".hyperparams_states[")
        return any(other.startswith(its_state) for other in arrays)

    injected = [name for name in arrays if ".hyperparams[" in name and not scheduled(name)]
    return {name: array_fact(arrays[name]) for name in injected}


def _computed_on(mesh: Mesh | None) -> dict[str, str]:
    """On what the last bits of a run depend, beside what it is."""
    device = default_device() if mesh is None else mesh.devices.flat[0]
    facts = {"device": device.device_kind, "devices": str(1 if mesh is None else mesh.size)}
    if device.platform != "cpu":
        return facts
    # Among which a sum is divided; of those of the machine the process may use some.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() if affinity is None else len(affinity(0))
    return {**facts, "cores": str(cores)}


def _name(tasks: Any) -> str:
    if not isinstance(tasks, eqx.Module):
        return type(tasks).__name__
    # Without where in memory a part of it is in this process.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(tasks).split())[:500])
