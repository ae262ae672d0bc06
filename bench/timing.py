"""Seconds of one repeat, on the CPU or a GPU, and how many repeats a method gets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

MOST, LEAST = 9, 3
TOO_SLOW, TOO_SLOW_BASELINE = 1, 8  # budgets: a step that takes longer is not repeated
HOPELESS = 20  # budgets: a step that takes longer is not waited for
SHORT = (
    0.02  # seconds: a repeat that is shorter is the mean of several, so that the clock and the scheduler matter less
)


def timed(work: Callable[[], object], device: str, inner: int = 1, before: Callable[[], None] = lambda: None) -> float:
    """Seconds of `work`, the mean of `inner`; `before` each one, outside the time."""
    total = 0.0
    for _ in range(inner):
        before()
        total += _cuda_seconds(work) if device == "cuda" else _seconds(work)
    return total / inner


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def repeats(one: float, budget: float, baseline: bool = False) -> int:
    """How many repeats of `one` seconds each: as many as the budget pays, at least 3, but 1 of what is far too slow.

    A repeat costs two steps, as an untimed one comes before.
    A baseline may take longer: its ratio is worth an interval.
    """
    if one > budget * (TOO_SLOW_BASELINE if baseline else TOO_SLOW):
        return 1
    return max(LEAST, min(MOST, math.floor(budget / max(2 * one, 1e-9))))


def inner_loops(one: float) -> int:
    return max(1, min(50, math.ceil(SHORT / max(one, 1e-9))))
