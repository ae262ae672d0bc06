"""Medians, intervals, paired ratios, and the exponent of a growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile, linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("got no values; expected at least one repeat")
    return Spread(statistics.median(values), percentile(values, 20), percentile(values, 80))


def paired(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of above / below, round by round: what disturbs a round disturbs both.

    A slow method may have taken part in fewer rounds: the first ones, which then are all that count.
    """
    return spread([a / b for a, b in zip(above, below, strict=False)])


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """k of value ~ size^k, least squares on the logarithms; nan below two sizes."""
    if len(sizes) < 2:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope
