"""Whether the devices of a run share its tasks."""

import equinox as eqx
import jax
from jax.sharding import Mesh

from .._jaxpr.flops import equations
from .._model.state import TrainState
from .._strategy.strategy import Strategy
from .._task.mesh import over_devices
from .._task.task import Task


def divides_tasks(strategy: Strategy, state: TrainState, tasks: Task, mesh: Mesh) -> bool:
    """False for an `outer_update` that takes the mean over tasks by itself: right, but computed by
    every device for every task."""
    with over_devices(mesh):  # JAX remembers the trace of a jitted `outer_update`
        trace = eqx.filter_make_jaxpr(strategy.outer_update)
        closed, _, _ = trace(state, tasks, key=jax.random.key(0))
    return any(eqn.primitive.name == "shard_map" for eqn in equations(closed.jaxpr))
