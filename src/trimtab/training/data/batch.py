"""Segments laid end to end as the tensors that a training step needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.training.data.segments import Segment


@dataclass(frozen=True, slots=True)
class Batch:
    """N rows of S packed segments.

    Attributes:
        tokens: int64 `[N]`.
        lengths: of the segments, S numbers that add up to N.
        targets: int64 `[N]`, the next token of each row; 0 where there is none.
        weights: float32 `[N]`, what a row's loss counts: 1, or 0 for rows that predict nothing.
        labels: int64 `[S]` for classification, -100 for padding; else None.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    targets: torch.Tensor
    weights: torch.Tensor
    labels: torch.Tensor | None = None

    @property
    def trained_tokens(self) -> int:
        """Rows that have a loss."""
        return int((self.weights > 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        labels = None if self.labels is None else self.labels.to(device)
        moved = (x.to(device) for x in (self.tokens, self.targets, self.weights))
        tokens, targets, weights = moved
        return Batch(tokens, self.lengths, targets, weights, labels)


def pack(segments: Sequence[Segment]) -> Batch:
    """One batch of `segments`, in their order, without padding."""
    tokens = np.concatenate([s.tokens for s in segments]).astype(np.int64)
    trained = np.concatenate([s.trained for s in segments])
    lengths = tuple(len(s) for s in segments)
    targets = np.zeros_like(tokens)
    targets[:-1] = tokens[1:]
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[:-1] = trained[1:]
    last = np.cumsum(lengths) - 1
    targets[last], weights[last] = 0, 0.0
    given = [s.label for s in segments if s.label is not None]
    labels = torch.tensor(given) if len(given) == len(segments) else None
    return Batch(
        torch.from_numpy(tokens), lengths, torch.from_numpy(targets), torch.from_numpy(weights), labels
    )


def split(segments: Sequence[Segment], max_tokens: int) -> list[list[Segment]]:
    """Groups of consecutive segments of at most `max_tokens` each; a longer segment is a group alone."""
    groups: list[list[Segment]] = []
    held = 0
    for segment in segments:
        if not groups or held + len(segment) > max_tokens:
            groups.append([])
            held = 0
        groups[-1].append(segment)
        held += len(segment)
    return groups
