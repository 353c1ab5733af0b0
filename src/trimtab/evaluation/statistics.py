"""The few statistics that reports quote."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)


def proportion_error(right: int, n: int) -> float | None:
    """Standard error of `right / n`, with two successes and two failures added (Agresti and Coull).

    The plain formula would call 20 out of 20 certain.
    """
    if n == 0:
        return None
    p = (right + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def quantile(values: Sequence[float], q: float) -> float:
    """The `q` quantile (0..1) with linear interpolation between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)
