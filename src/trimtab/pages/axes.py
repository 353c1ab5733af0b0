"""Scales and ticks of a picture's axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.pages.numbers import format_number

LOG_FROM = 8.0  # values that differ by more than this factor are shown on a logarithmic axis
LEAST_SHARE_SPAN = 0.25  # a share's axis shows at least a quarter, so that a point or two look small
MOST_POWERS = 7  # ticks on a logarithmic axis
LARGEST_POWER = 307  # of ten, of what a float can hold
FROM_ZERO_BELOW = 0.6  # smallest over largest value below which the axis starts at zero


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps `low..high` to 0..1, evenly or evenly in the logarithm."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    unit: str

    def place(self, value: float) -> float:
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def tick_text(self, tick: float) -> str:
        """A tick's number without needless zeros, e.g. `1.5 MiB`, `35`."""
        if tick == 0:
            return "0"
        number, space, unit = format_number(tick, self.unit).partition(" ")
        return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def scale_for(values: Sequence[float], unit: str, *, zero: bool = False) -> Scale:
    """A scale that shows `values` with some air around. `zero` prefers to start at zero."""
    low, high = min(values), max(values)
    if unit == "share":
        middle = min(max((low + high) / 2, LEAST_SHARE_SPAN / 2), 1 - LEAST_SHARE_SPAN / 2)
        low, high = min(low, middle - LEAST_SHARE_SPAN / 2), max(high, middle + LEAST_SHARE_SPAN / 2)
        return _linear(low, high, unit, pad=0.18)
    if not zero and low > 0 and high / low > LOG_FROM:
        return _log(low, high, unit)
    if zero and low >= 0 and low < FROM_ZERO_BELOW * high:
        return _linear(0.0, high, unit, pad=0.12, pad_low=False)
    return _linear(low, high, unit, pad=0.25)


def _linear(low: float, high: float, unit: str, pad: float, pad_low: bool = True) -> Scale:
    span = (high - low) or abs(high) * 0.2 or 1.0
    bottom = low - pad * span if pad_low else low
    top = high + pad * span
    base = 1024 ** math.floor(math.log(max(top, 1), 1024)) if unit == "B" else 1.0
    step = nice_step((top - bottom) / base / 5) * base
    first = math.ceil(bottom / step - 1e-9)
    ticks = tuple(i * step for i in range(first, math.floor(top / step + 1e-9) + 1))
    if unit == "share":
        ticks = tuple(t for t in ticks if -1e-9 <= t <= 1 + 1e-9)
    return Scale(bottom, top, False, ticks, unit)


def _log(low: float, high: float, unit: str) -> Scale:
    bottom, top = math.log10(low), math.log10(high)
    pad = 0.12 * (top - bottom)
    bottom, top = max(bottom - pad, -LARGEST_POWER), min(top + pad, LARGEST_POWER)
    digits = (1, 2, 5) if top - bottom < 3 else (1,)
    apart = math.ceil((top - bottom) / MOST_POWERS)
    powers = [p for p in range(math.floor(bottom), math.ceil(top) + 1) if p % apart == 0]
    places = [p + math.log10(digit) for p in powers for digit in digits]
    ticks = tuple(10.0**place for place in places if bottom <= place <= top)
    return Scale(10.0**bottom, 10.0**top, True, ticks, unit)


def nice_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, whichever is nearest to `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return min((d * power for d in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
