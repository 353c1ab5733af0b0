"""When requests arrive."""

from __future__ import annotations

import random


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times within `seconds` of a Poisson process of `rate` a second, ascending from 0.

    Gaps are independent and exponential with mean 1 / rate: what many users who know nothing of each other
    make together. Their number varies too; it is not rounded to `rate * seconds`.
    """
    times: list[float] = []
    at = rng.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate)
    return times
