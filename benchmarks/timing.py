"""Clocks for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import jax

T = TypeVar("T")


def best_of(repeats: int, run: Callable[[], T]) -> tuple[T, float]:
    """Runs once untimed, then `repeats` times; returns the last result and the shortest time in seconds."""
    result, times = run(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, min(times)


def finished(run: Callable[[], T]) -> T:
    """Waits for the device, so that the clock sees the work and not its dispatch."""
    return jax.block_until_ready(run())
