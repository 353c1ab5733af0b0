"""Learning-rate schedules: warm-up, a stable stretch, a decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Schedule:
    """The share of the peak learning rate at each step.

    warmup: steps, or a share of all steps (up to 1), over which the rate rises from 0.
    decay: steps, or a share of all steps (up to 1), at the end over which it falls towards `final`; never
        before the warm-up is over.
    shape: how it falls: `linear`, `cosine` or `sqrt` (1 - sqrt of the way, Hägele et al. 2024,
        arXiv 2405.18392).
    final: share of the peak that the fall would reach one step after the last.
    """

    warmup: float = 0.02
    decay: float = 0.2
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    final: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"'{name}' of the schedule is {getattr(self, name)}; it must be a number from 0 up"
                )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"'final' of the schedule is {self.final}; it must lie between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """What the peak rate is multiplied by at `step`, counted from 0, of `steps`."""
        warmup = _steps(self.warmup, steps)
        decay = min(_steps(self.decay, steps), max(steps - warmup, 0))
        if step < warmup:
            return (step + 1) / warmup
        if steps - step > decay:
            return 1.0
        way = 1 - (steps - step) / (decay + 1)
        falls = {
            "linear": 1 - way,
            "cosine": 0.5 * (1 + math.cos(math.pi * way)),
            "sqrt": 1 - math.sqrt(way),
        }
        return self.final + (1 - self.final) * falls[self.shape]


def _steps(amount: float, steps: int) -> int:
    return round(amount * steps) if amount <= 1 else round(amount)
