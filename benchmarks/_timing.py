"""Two things timed in turn in one process: what the machine does meanwhile meets both."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax


def in_turn(
    functions: dict[str, Callable[[], Any]], pairs: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of a call of each function, `pairs` times one after the other.

    A call beforehand warms up. What takes less than `at_least` seconds is called as often as
    makes up for it each time.
    """
    calls = {}
    for name, function in functions.items():
        _seconds(function, 1)
        calls[name] = max(1, math.ceil(at_least / _seconds(function, 1))) if at_least else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(pairs):
        for name, function in functions.items():
            seconds[name].append(_seconds(function, calls[name]))
    return seconds


def paired(
    baseline: Callable[[], Any],
    others: dict[str, Callable[[], Any]],
    pairs: int,
    at_least: float = 0.0,
) -> dict[str, list[float]]:
    """How many times as fast as `baseline` each of the others is, for every pair."""
    first, *seconds = in_turn({"": baseline, **others}, pairs, at_least).values()
    return {name: ratios(first, s) for name, s in zip(others, seconds, strict=True)}


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _seconds(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - began) / calls
