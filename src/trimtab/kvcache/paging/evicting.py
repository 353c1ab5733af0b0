"""When rows go: at the prompt's end as published, and if asked for also inside the prompt and while decoding.

`chunk`: also whenever the prompt grew by so many tokens, at multiples of it, so that the peak of a long
prompt falls. `interval`: back to the budget whenever so many tokens were generated since the prompt's end
(Devoto et al., Expected Attention, 2025, arXiv 2510.00636, whose library does so while decoding). All of
these are lengths of the text, and no step goes beyond one of them, so results do not depend on the steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.kernels.paged import Asked
from trimtab.kvcache.base import Sequence, StepRows
from trimtab.kvcache.paging.budget import BudgetOptions
from trimtab.kvcache.paging.row_policy import RowPolicy

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan

NEVER = 1 << 62


@dataclass(eq=False)
class EvictedSequence(Sequence):
    gone: int = 0  # rows dropped so far by a head; an even share where heads differ
    due: int = NEVER  # length of the text at which rows have to go next
    notes: tuple[Tensor, ...] = ()  # what the policy remembers of the text besides its rows


class Evicting(RowPolicy):
    """A policy with a budget a head. It says what it drops; when is the same for all."""

    options: BudgetOptions
    protected: int = 0  # rows that are never dropped
    interval: int | None = None

    @staticmethod
    def problems(options: Any, plan: Plan, config: ModelConfig) -> list[str]:
        if any(config.sliding_windows):
            return ["the model's own sliding-window layers already forget; use cache=full"]
        return []

    @staticmethod
    def drops_settled(options: Any) -> bool:
        return getattr(options, "interval", None) is not None

    @abstractmethod
    def drop(self, sequence: Any, keep: int) -> None:
        """Keep `keep` rows a head."""

    def make_sequence(self, slot: int, prompt_length: int) -> EvictedSequence:
        return EvictedSequence(slot, prompt_length)

    def new_sequence(self, slot: int, prompt_length: int) -> Sequence:
        sequence = super().new_sequence(slot, prompt_length)
        assert isinstance(sequence, EvictedSequence)
        sequence.due = self._next_due(sequence)
        return sequence

    def choose(self, sequence: Sequence, count: int) -> None:
        assert isinstance(sequence, EvictedSequence)
        if sequence.length < sequence.due:
            return
        keep = self._budget(sequence, sequence.length)
        self.drop(sequence, keep)
        sequence.gone = sequence.length - keep
        sequence.due = self._next_due(sequence)

    def most_rows(self, sequence: Sequence, count: int) -> int:
        assert isinstance(sequence, EvictedSequence)
        end = sequence.due if sequence.length >= sequence.prompt_length else sequence.prompt_length
        return super().most_rows(sequence, min(count, min(end, sequence.due) - sequence.length))

    def _budget(self, sequence: Sequence, length: int) -> int:
        return self.options.rows(min(length, sequence.prompt_length), self.protected)

    def _next_due(self, sequence: EvictedSequence) -> int:
        """The next of the lengths at which there is something to drop."""
        at = sequence.length
        while (at := self._boundary(sequence, at)) < NEVER:
            if at - sequence.gone > self._budget(sequence, at):
                return at
        return NEVER

    def _boundary(self, sequence: Sequence, length: int) -> int:
        end = sequence.prompt_length
        if length < end:
            step = self.options.chunk
            return end if step is None else min(end, (length // step + 1) * step)
        if self.interval is None:
            return NEVER
        return end + ((length - end) // self.interval + 1) * self.interval

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        if self.asked is not None:
            self.take_all(rows, kept, self.asked)
        super().commit(rows, kept)

    @abstractmethod
    def take_all(self, rows: StepRows, kept: Seq[int], asked: Asked) -> None:
        """The first `kept[i]` rows of span i are about to become permanent; this is what they asked."""

    def beside(self, sequence: Sequence) -> int:
        assert isinstance(sequence, EvictedSequence)
        return sum(note.nbytes for note in sequence.notes)
