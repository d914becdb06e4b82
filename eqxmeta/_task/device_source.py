"""Where the tasks of an outer step come from: sampled on the device, or loaded from the host."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_argument
from .._errors import annotate_errors, explain, takes
from .._jaxpr.flops import flops_of
from .task import Task

# What sources are asked for: `body(step, tasks, key, carry)` for every outer step of a range, with
# `key_of(step)`.
KeyOf: TypeAlias = Callable[[Any], PRNGKeyArray]
Body: TypeAlias = Callable[[Any, Task, PRNGKeyArray, PyTree], PyTree]

# The tasks of several outer steps are drawn at once: a few large kernels in the place of many small
# ones, of which hashing keys alone takes a good part of a step on a small model. But not so many
# that they fill the caches, or that it matters if a chunk ends before they are used up.
_MAX_BLOCK = 32
_BLOCK_BYTES = 2**18
_BLOCK_FLOPS = 2**22


@eqx.filter_jit(inline=True)  # pyright: ignore
def sample(tasks: Any, key: PRNGKeyArray) -> Any:
    """`tasks.sample(key)`, traced once: JAX remembers it for whoever asks for the same again."""
    return tasks.sample(key)


class Sampled(eqx.Module):
    """Tasks sampled inside the compiled loop, for `block` outer steps at a time. `example`: the
    shapes of the tasks of one."""

    tasks: Any
    meta_batch_size: int
    example: Task
    block: int

    def __init__(self, tasks: Any, meta_batch_size: int):
        self.tasks = tasks
        self.meta_batch_size = meta_batch_size

        def draw(key: PRNGKeyArray) -> Task:  # a method is hashed, for which all fields are needed
            return self.first(key)

        closed, self.example = jax.make_jaxpr(draw, return_shape=True)(jax.random.key(0))
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.example))
        fits = min(_BLOCK_BYTES // max(size, 1), _BLOCK_FLOPS // max(flops_of(closed), 1))
        self.block = max(1, min(_MAX_BLOCK, fits))

    def first(self, key: PRNGKeyArray) -> Task:
        """The tasks of an outer step whose key is `key`."""
        keys = jax.random.split(key, self.meta_batch_size)
        return jax.vmap(lambda key: sample(self.tasks, key))(keys)

    def for_each_step(self, start: Any, stop: Any, key_of: KeyOf, body: Body, carry: PyTree):
        # Blocks begin at multiples of their length, wherever the chunk does: a task is computed by
        # the same instructions, to the same bits, however the steps are cut.
        def block(number: Any, carry: PyTree) -> PyTree:
            begin = number * self.block
            keys = jax.vmap(key_of)(begin + jnp.arange(self.block))
            drawn = jax.vmap(self.first)(keys), keys

            def step(index: Any, carry: PyTree) -> PyTree:
                tasks, key = jax.tree.map(lambda x: x[index - begin], drawn)
                return body(index, tasks, key, carry)

            first, last = jnp.maximum(start, begin), jnp.minimum(stop, begin + self.block)
            return jax.lax.fori_loop(first, last, step, carry)

        return jax.lax.fori_loop(start // self.block, -(-stop // self.block), block, carry)


class Loaded(eqx.Module):
    """Batches of tasks from the host, for up to as many steps as the leading axis is long."""

    batches: PyTree

    def first(self, key: PRNGKeyArray) -> Task:
        return jax.tree.map(lambda x: x[0], self.batches)

    def for_each_step(self, start: Any, stop: Any, key_of: KeyOf, body: Body, carry: PyTree):
        def step(index: Any, carry: PyTree) -> PyTree:
            tasks = jax.tree.map(lambda x: x[index - start], self.batches)
            return body(index, tasks, key_of(index), carry)

        return jax.lax.fori_loop(start, stop, step, carry)


def is_device_source(tasks: object) -> bool:
    return hasattr(tasks, "sample")


def check_device_source(tasks: Any, argument: str, *, adapts: bool = True) -> Task:
    """The shapes of one sampled task. Raises `TypeError` or `ValueError`; compiles nothing.
    `adapts`, here and in `check_task`: something will adapt, for which there is a support set."""
    sound = isinstance(tasks, eqx.Module) and is_device_source(tasks)
    expected = "an `eqx.Module` with `sample(key) -> Task`, such as `eqxmeta.tasks.Sinusoid(...)`"
    check_argument(sound, tasks, argument, expected, TypeError, "is not a task source")
    with annotate_errors(
        f"`{argument}.sample(key)`",
        f"a key, and {repr(tasks)[:200]}",
        "`sample(key) -> Task`",
        seen=lambda error: not takes(tasks.sample, "key"),  # pyright: ignore
    ):
        task = eqx.filter_eval_shape(sample, tasks, jax.random.key(0))
    check_task(task, f"{argument}.sample(key)", adapts=adapts)
    return task


def check_task(task: Any, argument: str, *, leading: str = "example", adapts: bool = True) -> None:
    if not isinstance(task, Task):
        message = f"`{argument}` is not a task."
        raise TypeError(explain(message, type(task).__name__, "an `eqxmeta.Task`"))
    for name, field in (("support", task.support), ("query", task.query)):
        leaves = jax.tree.leaves(field)
        if not leaves and name == "support" and not adapts:
            continue
        if not leaves:
            message = f"`{argument}` has no {name} set."
            expected = "a pytree of arrays, such as (x, y)"
            if name == "support":
                expected += ": few-shot tasks, `Episodes` for one. `Minibatches` are for training"
            raise ValueError(explain(message, repr(field), expected))
        # Of examples there may be arrays beside that have no example axis, of tasks not.
        shapes = [getattr(leaf, "shape", None) for leaf in leaves]
        empty = any(shape is None or shape[:1] == (0,) for shape in shapes)
        sizes = {shape[:1] for shape in shapes if shape is not None}
        if empty or (leading == "task" and (len(sizes) != 1 or () in sizes)):
            message = f"`{argument}.{name}` does not lead with one {leading} axis."
            received = f"shapes {shapes}" + ", None for what is not an array" * (None in shapes)
            expected = f"arrays, and in each that has it a leading {leading} axis of 1 or longer"
            if leading == "task":
                expected = "the same leading task axis, 1 or longer, in every array"
            raise ValueError(explain(message, received, expected))
