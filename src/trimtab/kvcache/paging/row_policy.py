"""What policies on rows held head by head have in common: they write, attend, commit, and then choose.

By itself this keeps every row: packing policies (kivi, rtn) are just that on a store of their own. Policies
that choose rows override `note`, which sees a step's queries, and `choose`, called when rows are permanent.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Literal

from torch import Tensor

from trimtab.kernels.paged import PagedRows
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows
from trimtab.kvcache.paging.heads import HeadRows
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.registry import KV_CACHES


class RowPolicy(KVCache):
    stage: ClassVar[Literal["alone", "keep", "store", "place"]] = "keep"
    notes_bytes: ClassVar[int] = 0  # what the policy keeps beside each row

    def __init__(self, shape: KVShape, options: Any, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self.rows = self._build(memory_bytes)
        self.chunks_generated = self.chunks_generated and self.rows.chunks_generated
        self._open: dict[int, Sequence] = {}

    def _build(self, memory_bytes: int) -> HeadRows:
        """The store: this policy's own, or that of a method it is combined with; then who places it."""
        parts = [(type(self), self.options)]
        parts += [(KV_CACHES.get(choice.name).cls, choice.options) for choice in self.shape.chain]
        stages = {cls.stage: (cls, options) for cls, options in parts}
        store, options = stages.get("store", (RowPolicy, None))
        rows = store.make_rows(self.shape, options, memory_bytes, self.notes_bytes)
        if "place" in stages:
            place, options = stages["place"]
            rows = place.place_rows(rows, options)
        return rows

    @classmethod
    def make_rows(cls, shape: KVShape, options: Any, memory_bytes: int, notes_bytes: int) -> HeadRows:
        """For stage `store`: the rows in this method's form."""
        return PerHeadRows(shape, memory_bytes, notes_bytes)

    @classmethod
    def place_rows(cls, rows: HeadRows, options: Any) -> HeadRows:
        """For stage `place`: the same rows, elsewhere."""
        raise NotImplementedError

    def new_sequence(self, slot: int, prompt_length: int) -> Sequence:
        self.rows.open(slot, prompt_length)
        self._open[slot] = self.make_sequence(slot, prompt_length)
        return self._open[slot]

    def make_sequence(self, slot: int, prompt_length: int) -> Sequence:
        return Sequence(slot, prompt_length)

    def release(self, sequence: Sequence) -> None:
        self.rows.close(sequence.slot)
        del self._open[sequence.slot]

    def reserve(self, sequence: Sequence, count: int) -> bool:
        return self.rows.reserve(sequence.slot, count, self._beside)

    # --- a step

    def note(self, layer: int, q: Tensor, lse: Tensor, rows: StepRows) -> None:
        """See the rotated queries [N, H, d] of the step and their logsumexp [N, H]."""

    def notes(self, rows: StepRows) -> bool:
        """Whether `note` must see this step; if not it may run in one native call."""
        return False

    def choose(self, sequence: Sequence, count: int) -> None:
        """`count` rows became permanent: drop rows, if it is time."""

    def whole_step(self, rows: StepRows) -> PagedRows | None:
        return None if self.notes(rows) else self.rows.whole_step(rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels = self.shape.kernels
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        self.rows.write(layer, k, v, rows)
        out, lse = self.rows.attend(layer, q, rows)
        self.note(layer, q, lse, rows)
        return out

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        self.rows.arrange(rows.sequences[span].slot, order)

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        for sequence, count in zip(rows.sequences, kept, strict=True):
            self.rows.grow(sequence.slot, count)
            self.choose(sequence, count)
            if sequence.length >= sequence.prompt_length:
                self.bytes_moved += self.rows.settle(sequence.slot)
        self.bytes_fetched += self.rows.fetched
        self.bytes_moved += self.rows.fetched
        self.rows.fetched = 0

    # --- meters

    def beside(self, sequence: Sequence) -> int:
        """Bytes that the policy holds for a text besides its rows."""
        return 0

    @property
    def _beside(self) -> int:
        return sum(self.beside(s) for s in self._open.values())

    @property
    def bytes_capacity(self) -> int:
        return self.rows.bytes_capacity

    @property
    def bytes_held(self) -> int:
        return self.rows.bytes_used + self._beside

    @property
    def bytes_host(self) -> int:
        return self.rows.bytes_host

    @property
    def exhausted(self) -> str:
        return self.rows.exhausted or super().exhausted

    def held_by(self, sequence: Sequence) -> int:
        return self.rows.held(sequence.slot) + self.beside(sequence)

    def host_held_by(self, sequence: Sequence) -> int:
        return self.rows.host_held(sequence.slot)

    def read_per_step(self, sequence: Sequence) -> int:
        return self.rows.read(sequence.slot)

    def check(self) -> None:
        self.rows.check()
