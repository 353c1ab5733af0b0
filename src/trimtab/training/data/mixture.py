"""Several sources mixed by their share of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source


class Mixture(Source):
    """Gives the next segment from the source that is furthest behind its share of tokens.

    So the shares hold at any moment, to within a segment, and there is nothing random to keep.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        total = sum(weights)
        self.shares = [w / total for w in weights]
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
        self.taken = list(state["taken"])
        for source, kept in zip(self.sources, state["sources"], strict=True):
            source.restore(kept)
