"""Several sources mixed by their share of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimtab.errors import ConfigError
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source


def shares_of(weights: Sequence[float]) -> list[float]:
    """Weights as shares that add up to 1; ConfigError for a weight that is none, or nothing but zeros."""
    for weight in weights:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ConfigError(f"the 'weight' of a source is {weight!r}; it must be a number from 0 up")
    total = sum(weights)
    if not total:
        raise ConfigError("every source of the mixture has the weight 0; give one of them more")
    return [weight / total for weight in weights]


class Mixture(Source):
    """Gives the next segment from the source that is furthest behind its share of tokens.

    So the shares hold at any moment, to within a segment, and there is nothing random to keep.

    Attributes:
        names: of the sources, for reports.
        shares: the wanted shares, which add up to 1.
        taken: tokens given so far, by source.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], names: Sequence[str] | None = None
    ) -> None:
        self.sources = list(sources)
        self.names = list(names) if names is not None else [f"source {i + 1}" for i in range(len(sources))]
        self.shares = shares_of(weights)
        self.taken = [0] * len(self.sources)

    def next(self) -> Segment:
        given = sum(self.taken)
        behind = [share * (given + 1) - t for share, t in zip(self.shares, self.taken, strict=True)]
        index = behind.index(max(behind))
        segment = self.sources[index].next()
        self.taken[index] += len(segment)
        return segment

    def state(self) -> dict[str, Any]:
        return {"taken": list(self.taken), "sources": [s.state() for s in self.sources]}

    def restore(self, state: dict[str, Any]) -> None:
        kept = len(state["sources"])
        if kept != len(self.sources):
            raise ConfigError(
                f"the checkpoint was written with {kept} sources of data and the recipe has "
                f"{len(self.sources)}; restore the recipe's mixture, or start a new run"
            )
        self.taken = list(state["taken"])
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.restore(own)
