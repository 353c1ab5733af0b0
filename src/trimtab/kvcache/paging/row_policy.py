"""What policies on rows held head by head have in common: they write, attend, commit, and then choose.

By itself this keeps every row: packing policies (kivi, rtn) are just that on a store of their own. Policies
that choose rows override `choose`, called when rows are permanent; those that weigh them by what was asked
say so in `asks`, and find the queries of all layers in `asked` at the commit.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import Asked, PagedRows
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows
from trimtab.kvcache.paging.heads import HeadRows
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.registry import KV_CACHES


class RowPolicy(KVCache):
    stage: ClassVar[Literal["alone", "keep", "store", "place"]] = "keep"
    notes_bytes: ClassVar[int] = 0  # what the policy keeps beside each row
    asks_rotated: bool = True  # whether queries are wanted after rotary embedding

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
        rows = self.rows
        return rows.fits(sequence.slot, count) or rows.reserve(sequence.slot, count, self._beside)

    def most_rows(self, sequence: Sequence, count: int) -> int:
        return self.rows.most_rows(sequence.slot, super().most_rows(sequence, count))

    # --- a step

    def asks(self, rows: StepRows) -> bool:
        """Whether the step's queries are wanted in `asked`."""
        return False

    def begin(self, rows: StepRows) -> None:
        self.asked = None
        if self.asks(rows):
            s, n = self.shape, rows.positions.shape[0]
            self.asked = Asked(
                queries=torch.empty(s.num_layers, n, s.num_heads, s.head_dim, device=s.device),
                lse=torch.empty(s.num_layers, n, s.num_heads, device=s.device),
                rotated=self.asks_rotated,
            )

    def choose(self, sequence: Sequence, count: int) -> None:
        """`count` rows became permanent: drop rows, if it is time."""

    def whole_step(self, rows: StepRows) -> PagedRows | CodedTables | None:
        return self.rows.whole_step(rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels, asked = self.shape.kernels, self.asked
        if asked is not None and not asked.rotated:
            asked.queries[layer] = q
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        self.rows.write(layer, k, v, rows)
        out, lse = self.rows.attend(layer, q, rows)
        if asked is not None:
            asked.lse[layer] = lse
            if asked.rotated:
                asked.queries[layer] = q
        return out

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        self.rows.arrange(rows.sequences[span].slot, order)
        if self.asked is not None:
            first = rows.bounds[span][0]
            source = torch.tensor(order, device=self.shape.device) + first
            for values in (self.asked.queries, self.asked.lse):
                values[:, first : first + len(order)] = values[:, source]

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
        # A list first: a server reads the meters from another thread than the one that opens sequences.
        return sum(self.beside(s) for s in list(self._open.values()))

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
