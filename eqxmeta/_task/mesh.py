"""The devices of a run: a mesh with one axis, along which tasks (or seeds) are divided."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._errors import explain

Devices: TypeAlias = Literal["all"] | Sequence[Any] | None

_AXIS = "tasks"
_EXPECTED = "None (one device), 'all', or distinct devices of one kind, such as `jax.devices()[:2]`"

# A part of the key under which JAX remembers traces: a strategy's jitted `outer_update` is another
# on several devices, though nothing in its arguments says so.
_current = jax.make_user_context(None)


def mesh_of(devices: Any, argument: str) -> Mesh | None:
    """`None` for a single device: that on which JAX computes by default. With several processes
    `devices` are all there are, or some of this process alone."""
    message = f"`{argument}` is invalid."
    if devices is None:
        return None
    if isinstance(devices, str):
        if devices != "all":
            raise ValueError(explain(message, repr(devices), _EXPECTED))
        devices = jax.devices()
    sound = isinstance(devices, Sequence) and all(isinstance(d, jax.Device) for d in devices)
    if not sound:
        raise TypeError(explain(message, repr(devices), _EXPECTED))
    alike = len({d.platform for d in devices}) == 1 and len(set(devices)) == len(devices)
    here = set(devices) <= set(jax.local_devices()) or set(devices) == set(jax.devices())
    if not alike or not here:
        expected = _EXPECTED if here else "'all', or devices of this process"
        raise ValueError(explain(message, repr(list(devices)), expected))
    if list(devices) == [default_device()]:
        return None
    # Explicit axis types would ask every model to say how it is laid out.
    return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def check_divides(mesh: Mesh | None, tasks: int, argument: str) -> None:
    if mesh is None or tasks % mesh.size == 0:
        return
    below = tasks // mesh.size * mesh.size
    nearest = " or ".join(str(n) for n in (below, below + mesh.size) if n)
    message = f"`{argument}` cannot be divided among the devices."
    received = f"{tasks} tasks, {mesh.size} devices"
    raise ValueError(explain(message, received, f"a multiple of {mesh.size}, such as {nearest}"))


@contextmanager
def over_devices(mesh: Mesh | None) -> Iterator[None]:
    """`mean_over_tasks`, traced inside of the block, divides the tasks along `mesh`."""
    with _current(mesh):
        yield


def mesh_of_tasks() -> Mesh | None:
    return _current.value


def default_device() -> Any:
    """That on which JAX computes where nothing is said: see `jax.default_device`."""
    with jax.ensure_compile_time_eval():  # `fit_grid` makes trainers while it traces
        [device] = jnp.zeros(()).devices()
    return device


def platform() -> str:
    """Of the devices that the program which is traced will run on: "cpu", "gpu", ..."""
    mesh = mesh_of_tasks()
    return (default_device() if mesh is None else mesh.devices.flat[0]).platform


def divide(
    fun: Callable[[PyTree, PyTree], PyTree],
    mesh: Mesh,
    *,
    results: Literal["agree", "divided", "gathered"],
) -> Callable[[PyTree, PyTree], PyTree]:
    """`fun(parts, shared)` on every device, of its part along the leading axes of `parts`.

    The results agree on all devices; or they have such an axis, of which each device keeps its part
    ("divided") or gets the whole ("gathered"). `shared`: arguments of the program that `fun` needs;
    JAX does not let it close over them. (Over values that the program computes it may.)"""

    def part(parts: PyTree, shared: PyTree) -> PyTree:
        out = fun(parts, shared)
        return jax.lax.all_gather(out, _AXIS, tiled=True) if results == "gathered" else out

    axis, whole = PartitionSpec(_AXIS), PartitionSpec()
    out = axis if results == "divided" else whole
    # `check_vma` fails over a `pmean` along an axis of `vmap`, as support statistics have it.
    return jax.shard_map(part, mesh=mesh, in_specs=(axis, whole), out_specs=out, check_vma=False)


def mean_over_devices(tree: PyTree) -> PyTree:
    """Inside of `divide`: the mean of what is floating point, in one all-reduce."""
    inexact, others = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.pmean(inexact, _AXIS), others)


def replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays of `tree` on all devices of the mesh."""
    return _put(tree, mesh, PartitionSpec())


def divided(tree: PyTree, mesh: Mesh | None, *, axis: int = 0) -> PyTree:
    """The arrays of `tree`, each device with its part of `axis`."""
    return _put(tree, mesh, PartitionSpec(*[None] * axis, _AXIS))


def keep_replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside of a program: the next one finds its arguments as this one did."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays, others = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.with_sharding_constraint(arrays, sharding), others)


def on_one_device(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """What is `replicated`, as ordinary arrays on the first of this process's devices."""
    if mesh is None:
        return tree

    def first(x: Any) -> Any:
        return x.addressable_data(0) if eqx.is_array(x) else x

    return jax.tree.map(first, tree)


def _put(tree: PyTree, mesh: Mesh | None, spec: PartitionSpec) -> PyTree:
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, spec)

    def put(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        if getattr(x, "sharding", None) == sharding:
            return x
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data, kind = jax.random.key_data(x), jax.random.key_impl(x)
            return jax.random.wrap_key_data(put(data), impl=kind)
        host = np.asarray(x)  # the same in every process
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
