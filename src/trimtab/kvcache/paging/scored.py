"""Policies that score all rows of a head at once, when rows have to go, and keep the best.

A scorer says how good rows are and what of the queries it must remember for that; the policy picks. Rows keep
the order of the text, so the first rows of a head are the first tokens and the last the latest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.kernels.paged import Asked
from trimtab.kvcache.base import KVShape, Sequence, StepRows
from trimtab.kvcache.paging.budget import BudgetOptions
from trimtab.kvcache.paging.evicting import NEVER, EvictedSequence, Evicting
from trimtab.kvcache.paging.heads import HeadRows


@dataclass(frozen=True, slots=True)
class ScoredOptions(BudgetOptions):
    interval: int | None = field(
        default=None,
        metadata={"help": "back to the budget whenever so many tokens were generated; none = keep them all"},
    )


class Scorer(ABC):
    """Scores of one policy's rows; `options` are those of the policy that it is named after."""

    rotated: ClassVar[bool] = True  # whether it looks at queries after rotary embedding

    def __init__(self, shape: KVShape, rows: HeadRows, options: Any) -> None:
        self.shape, self.rows, self.options = shape, rows, options

    @staticmethod
    @abstractmethod
    def protected(options: Any) -> int:
        """Rows that a head never loses."""

    @abstractmethod
    def new_notes(self) -> tuple[Tensor, ...]:
        """What is remembered of a text until rows go."""

    @abstractmethod
    def first_asked(self, sequence: EvictedSequence) -> int:
        """Number of the first token, of those not yet computed, whose query counts."""

    @abstractmethod
    def take(self, sequence: EvictedSequence, first: int, queries: Tensor) -> None:
        """Remember the queries [L, n, H, d] of tokens `first` and following; row by row, in their order."""

    @abstractmethod
    def scores(self, sequence: EvictedSequence) -> Tensor:
        """float32 [L, G, n] on the CPU for the n rows of the longest head: infinite for protected rows,
        minus infinity behind a head's last."""


class Scored(Evicting):
    scorer: type[Scorer]
    options: ScoredOptions

    def __init__(self, shape: KVShape, options: ScoredOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self.interval = options.interval
        self.scoring = self._scoring()
        self.protected = self.scoring.protected(self.scoring.options)
        self.asks_rotated = self.scoring.rotated

    def _scoring(self) -> Scorer:
        return self.scorer(self.shape, self.rows, self.options)

    def new_sequence(self, slot: int, prompt_length: int) -> Sequence:
        sequence = super().new_sequence(slot, prompt_length)
        assert isinstance(sequence, EvictedSequence)
        if sequence.due < NEVER:
            sequence.notes = self.scoring.new_notes()
        return sequence

    def asks(self, rows: StepRows) -> bool:
        for sequence, (begin, end) in zip(rows.sequences, rows.bounds, strict=True):
            if sequence.length + end - begin > self._first_asked(sequence):
                return True
        return False

    def _first_asked(self, sequence: Any) -> int:
        return NEVER if sequence.due == NEVER else self.scoring.first_asked(sequence)

    def take_all(self, rows: StepRows, kept: Seq[int], asked: Asked) -> None:
        for sequence, (begin, _), count in zip(rows.sequences, rows.bounds, kept, strict=True):
            assert isinstance(sequence, EvictedSequence)
            skip = max(0, self._first_asked(sequence) - sequence.length)
            if skip < count:
                queries = asked.queries[:, begin + skip : begin + count]
                self.scoring.take(sequence, sequence.length + skip, queries)

    def choose(self, sequence: Sequence, count: int) -> None:
        super().choose(sequence, count)
        assert isinstance(sequence, EvictedSequence)
        if sequence.due == NEVER:
            sequence.notes = ()

    def drop(self, sequence: EvictedSequence, keep: int) -> None:
        kept = self.pick(self.scoring.scores(sequence), keep)
        count = kept.sum(2)
        # Kept rows first, in their order.
        index = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[..., : int(count.max())]
        self.bytes_moved += self.rows.keep(sequence.slot, index, count)

    def pick(self, scores: Tensor, keep: int) -> Tensor:
        """Which rows stay, bool [L, G, n]: here the best `keep` of every head, the earlier one of equals."""
        order = scores.argsort(dim=2, descending=True, stable=True)[..., :keep]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, order, True)
