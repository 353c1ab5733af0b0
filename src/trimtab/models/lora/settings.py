"""What an adapter is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

    rank: of the update of each matrix.
    alpha: the update is scaled by `alpha / rank`; default: twice the rank.
    dropout: share of inputs that the adapters do not see in training.
    targets: names of the projections that get one (`q_proj`, ...), or `all-linear`.
    rslora: scale by `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv 2312.03732).
    seed: decides the starting values.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"'rank' of the adapter is {self.rank}; it must be at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"'alpha' of the adapter is {self.alpha}; it must be more than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"'dropout' of the adapter is {self.dropout}; it must be from 0 to below 1")
        if not self.targets:
            raise ConfigError(f"'targets' of the adapter is empty; name projections, or {ALL_LINEAR!r}")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
