"""What an outer step will cost, and what the knobs do about it, before it is run."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._flops import count_flops
from ._inner_loop import InnerLoop
from ._packed import pack
from ._state import TrainState
from ._strategy import Strategy
from ._task import Task, count_tasks

# Less than this is not worth a word, nor is an alternative that needs more than half as much.
_LITTLE = 64 * 2**20
_HALF = 0.5
# Operations that an alternative may cost more, and still be recommended for its memory: mixed mode
# counts a third more than reverse mode, for evaluating again what that one has to fetch.
_TOLERATED = 1.5


@dataclass(frozen=True)
class PlanRow:
    """One way to compute the same outer step.

    - `gradient`, `remat`: of the `InnerLoop`; `task_chunk`: of the strategy. `None` where the
      strategy has no such knob (or, for `task_chunk`, all tasks at once).
    - `temp_bytes`: memory that the compiled step needs beside its arguments and results.
    - `flops`: operations, with every iteration of every loop counted.
    - `compile_seconds`: what tracing and compiling took here and now.
    """

    gradient: str | None
    remat: bool | int | None
    task_chunk: int | str | None
    temp_bytes: int
    flops: int
    compile_seconds: float


@dataclass(frozen=True)
class Plan:
    """`rows[0]` is the strategy as it is, the others change one knob each; `recommended` is one of
    them. Print it."""

    rows: tuple[PlanRow, ...]
    recommended: PlanRow
    reason: str

    def __str__(self) -> str:
        names = f"{'task_chunk':>12}{'memory':>12}{'GFLOP':>10}{'compile':>9}"
        lines = [f"  {'gradient':12}{'remat':>6}{names}"]
        for row in self.rows:
            mark = "*" if row is self.recommended else " "
            chunk = "all" if row.task_chunk is None else row.task_chunk
            lines.append(
                f"{mark} {row.gradient or '-':12}{'-' if row.remat is None else row.remat!s:>6}"
                f"{chunk!s:>12}{row.temp_bytes / 2**20:>8.1f} MiB{row.flops / 1e9:>10.3f}"
                f"{row.compile_seconds:>7.1f} s"
            )
        return "\n".join([*lines, f"* {self.reason}"])


def make_plan(strategy: Strategy, state: TrainState, tasks: Task, *, alone: bool = False) -> Plan:
    """Compile the outer step in every variant, or `alone` as it is. `tasks` may be the shapes of a
    batch."""
    if alone:
        row = _measure(strategy, state, tasks)
        return Plan((row,), row, "as it is; `trainer.plan(model, tasks)` compiles alternatives")
    rows = tuple(_measure(variant, state, tasks) for variant in _variants(strategy, tasks))
    return Plan(rows, *_recommend(rows))


def _variants(strategy: Strategy, tasks: Task) -> Iterator[Strategy]:
    yield strategy
    inner: Any = getattr(strategy, "inner", None)
    if isinstance(inner, InnerLoop) and inner.gradient != "first_order":
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


def _with(strategy: Strategy, where: Any, value: Any) -> Strategy:
    return eqx.tree_at(where, strategy, value, is_leaf=lambda x: x is None)


def _measure(strategy: Strategy, state: TrainState, tasks: Task) -> PlanRow:
    def step(state: TrainState, tasks: Task, key: Any) -> PyTree:
        new, metrics = strategy.outer_update(state, tasks, key=key)
        return new, pack(metrics)  # as the training program keeps them

    key = jax.random.key(0)
    began = time.perf_counter()
    dynamic, static = eqx.partition(state, eqx.is_array)
    compiled = (
        jax.jit(
            lambda dynamic, tasks, key: eqx.filter(
                step(eqx.combine(dynamic, static), tasks, key), eqx.is_array
            )
        )
        .lower(dynamic, tasks, key)
        .compile()
    )
    seconds = time.perf_counter() - began
    inner = getattr(strategy, "inner", None)
    return PlanRow(
        gradient=getattr(inner, "gradient", None),
        remat=getattr(inner, "remat", None),
        task_chunk=getattr(strategy, "task_chunk", None),
        temp_bytes=int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)),
        flops=count_flops(step, state, tasks, key),
        compile_seconds=seconds,
    )


def _recommend(rows: tuple[PlanRow, ...]) -> tuple[PlanRow, str]:
    now = rows[0]
    memory = _memory()
    if memory is not None and now.temp_bytes > memory:
        fitting = [row for row in rows if row.temp_bytes <= memory]
        if not fitting:
            smallest = min(rows, key=lambda row: row.temp_bytes)
            return smallest, "nothing here fits into memory; this needs least. Try them together"
        return min(
            fitting, key=lambda row: row.flops
        ), "as it is, the step does not fit into memory"
    cheap = [row for row in rows if row.flops <= _TOLERATED * now.flops]
    best = min(cheap, key=lambda row: row.temp_bytes)
    if now.temp_bytes > _LITTLE and best.temp_bytes < _HALF * now.temp_bytes:
        return (
            best,
            f"{now.temp_bytes / best.temp_bytes:.1f} times less memory for about the same work",
        )
    return now, "as it is: nothing else saves much memory at about the same work"


def _memory() -> int | None:
    """Bytes that the device has, if it tells."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return None
