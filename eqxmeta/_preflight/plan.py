"""What an outer step will cost, and what the knobs do about it, before it is run."""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from .._jaxpr.flops import count_flops
from .._meta_gradient.inner_loop import InnerLoop
from .._meta_gradient.modes import refuses_mixed
from .._model.state import TrainState
from .._strategy.gradient_strategy import GradientStrategy
from .._strategy.metrics import columns
from .._strategy.rollout_strategy import RolloutStrategy
from .._strategy.strategy import Strategy
from .._task.mesh import default_device, keep_replicated, over_devices, replicated
from .._task.task import Task, count_tasks

# Less than this is not worth a word, nor is an alternative that needs more than half as much.
_LITTLE = 64 * 2**20
_HALF = 0.5
# Operations that an alternative may cost more, and still be recommended for its memory: mixed mode
# counts a third more than reverse mode, for evaluating again what that one has to fetch.
_TOLERATED = 1.5
# Of a container, as it sees its own limit: control groups of version 2 and 1.
_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@dataclass(frozen=True)
class PlanRow:
    """One way to compute the same outer step.

    - `gradient`, `remat`: of the `InnerLoop`; `task_chunk`: of the strategy. `None` where the
      strategy has no such knob (or, for `task_chunk`, all tasks at once). There is no row for
      another one that makes no difference.
    - `temp_bytes`: memory that the compiled step needs beside its arguments and results.
    - `flops`: operations, with every iteration of every loop counted.
    - `collective_bytes`: what each of several devices sends to the others in a step; `sent` in the
      printed table.
    - `compile_seconds`: what tracing and compiling took here and now.
    """

    gradient: str | None
    remat: bool | int | None
    task_chunk: int | str | None
    temp_bytes: int
    flops: int
    compile_seconds: float
    collective_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """`rows[0]` is the strategy as it is, the others change one knob each; `recommended` is one of
    them. There is no row for what would be the same program as another, or cannot be computed.
    Print it."""

    rows: tuple[PlanRow, ...]
    recommended: PlanRow
    reason: str

    def __str__(self) -> str:
        several = any(row.collective_bytes for row in self.rows)
        sent = f"{'sent':>12}" if several else ""
        names = f"{'task_chunk':>12}{'memory':>12}{sent}{'GFLOP':>10}{'compile':>9}"
        lines = [f"  {'gradient':12}{'remat':>6}{names}"]
        for row in self.rows:
            mark = "*" if row is self.recommended else " "
            chunk = "all" if row.task_chunk is None else row.task_chunk
            sent = f"{row.collective_bytes / 2**20:>8.2f} MiB" if several else ""
            lines.append(
                f"{mark} {row.gradient or '-':12}{'-' if row.remat is None else row.remat!s:>6}"
                f"{chunk!s:>12}{row.temp_bytes / 2**20:>8.1f} MiB{sent}{row.flops / 1e9:>10.3f}"
                f"{row.compile_seconds:>7.1f} s"
            )
        return "\n".join([*lines, f"* {self.reason}"])


def make_plan(
    strategy: Strategy,
    state: TrainState,
    tasks: Task,
    mesh: Mesh | None = None,
    *,
    alone: bool = False,
) -> Plan:
    """Compile the outer step in every variant that is another program, or `alone` as it is. `tasks`
    may be the shapes of a batch. Of several devices, `mesh`, what each one needs is told."""
    seen: set[str] = set()
    rows: list[PlanRow] = []
    for variant in [strategy] if alone else _variants(strategy, tasks):
        try:
            row = _measure(variant, state, tasks, mesh, seen)
        except TypeError as error:
            if not rows or not refuses_mixed(error):
                raise
            continue  # what the user chose is right, and mixed mode no alternative
        if row is not None:
            rows.append(row)
    if alone:
        return Plan(
            (*rows,), rows[0], "as it is; `trainer.plan(model, tasks)` compiles alternatives"
        )
    return Plan((*rows,), *_recommend((*rows,)))


def _variants(strategy: Strategy, tasks: Task) -> Iterator[Strategy]:
    yield strategy
    inner: Any = _differentiated(strategy)
    if inner is not None and inner.gradient != "first_order":
        other = "reverse" if inner.gradient == "mixed" else "mixed"
        yield _with(strategy, lambda s: s.inner.gradient, other)
        # The first step is outside of the loop, and a loop of one or two has nothing to drop.
        if inner.steps > 3:
            yield _with(strategy, lambda s: s.inner.remat, inner.remat is False)
    if hasattr(strategy, "task_chunk"):
        total = count_tasks(tasks)
        middle = max(n for n in range(1, int(total**0.5) + 1) if total % n == 0)
        chunks = [chunk for chunk in (1, middle) if chunk < total]
        for chunk in dict.fromkeys([*chunks, None]):
            if chunk != strategy.task_chunk:  # pyright: ignore
                yield _with(strategy, lambda s: s.task_chunk, chunk)


def _differentiated(strategy: Strategy) -> InnerLoop | None:
    """The inner loop through which the outer step goes back, if it does."""
    if isinstance(strategy, GradientStrategy) and isinstance(strategy, RolloutStrategy):
        return strategy.inner
    return None


def _with(strategy: Strategy, where: Any, value: Any) -> Strategy:
    return eqx.tree_at(where, strategy, value, is_leaf=lambda x: x is None)


def _measure(
    strategy: Strategy, state: TrainState, tasks: Task, mesh: Mesh | None, seen: set[str]
) -> PlanRow | None:
    """`None` if the program is among those `seen`: what `task_chunk="auto"` comes down to, or both
    modes of a single inner step. It is added to them."""

    def step(state: TrainState, tasks: Task, key: Any) -> PyTree:
        with over_devices(mesh):
            new, metrics = strategy.outer_update(state, tasks, key=key)
        return keep_replicated((new, columns(metrics)), mesh)  # as the training program keeps them

    key = jax.random.key(0)
    began = time.perf_counter()
    dynamic, static = eqx.partition(state, eqx.is_array)
    dynamic = replicated(dynamic, mesh)
    lowered = jax.jit(
        lambda dynamic, tasks, key: eqx.filter(
            step(eqx.combine(dynamic, static), tasks, key), eqx.is_array
        )
    ).lower(dynamic, tasks, key)
    program = lowered.as_text()
    if program in seen:
        return None
    seen.add(program)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    inner = _differentiated(strategy)
    return PlanRow(
        gradient=getattr(inner, "gradient", None),
        remat=getattr(inner, "remat", None),
        task_chunk=getattr(strategy, "task_chunk", None),
        temp_bytes=int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)),
        flops=count_flops(step, state, tasks, key),
        compile_seconds=seconds,
        collective_bytes=_collective_bytes(compiled.as_text() or "") if mesh is not None else 0,
    )


# Those that run beside other work are two lines, of which the second has the result alone.
_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-done)?\("
)
_ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")


def _collective_bytes(program: str) -> int:
    """What goes to other devices, by the text of the compiled program: `f32[3,2]` is 24 bytes."""

    def size(bits: str, shape: str) -> int:
        return int(bits) // 8 * math.prod(int(n) for n in shape.split(",") if n)

    arrays = _ARRAY.findall(" ".join(_COLLECTIVE.findall(program)))
    return sum(size(bits, shape) for bits, shape in arrays)


def _recommend(rows: tuple[PlanRow, ...]) -> tuple[PlanRow, str]:
    now = rows[0]
    memory = _memory()
    if memory is not None and now.temp_bytes > memory:
        fitting = [row for row in rows if row.temp_bytes <= memory]
        if not fitting:
            smallest = min(rows, key=lambda row: row.temp_bytes)
            return smallest, "nothing here fits into memory; this needs least. Try them together"
        best = min(fitting, key=lambda row: row.flops)
        return best, "as it is, the step does not fit into memory" + _proviso(now, best)
    cheap = [row for row in rows if row.flops <= _TOLERATED * now.flops]
    best = min(cheap, key=lambda row: row.temp_bytes)
    if now.temp_bytes > _LITTLE and best.temp_bytes < _HALF * now.temp_bytes:
        saved = f"{now.temp_bytes / best.temp_bytes:.1f} times less memory"
        return best, f"{saved} for about the same work" + _proviso(now, best)
    return now, "as it is: nothing else saves much memory at about the same work"


def _proviso(now: PlanRow, best: PlanRow) -> str:
    # Whoever chose reverse mode may need it: a plan looks at costs, not at derivatives.
    if (now.gradient, best.gradient) != ("reverse", "mixed"):
        return ""
    return "; only if `eqxmeta.check_meta_gradient` says that 'mixed' may be used"


def _memory() -> int | None:
    """Bytes that the device has, or that this process may take of them, if that can be told."""
    device = default_device()
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [limit for path in _LIMITS if (limit := _read_limit(path)) is not None]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on every platform
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def _read_limit(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # there is none: no such file, or "max" in it
        return None
