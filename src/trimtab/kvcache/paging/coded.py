"""Rows kept head by head of which the older part is coded in a few bits.

What packing policies stand on, alone or under a policy that chooses rows. New rows are stored in full; when
the prompt is complete (and rows were chosen), and after every commit from then on, what is due is coded and
its full pages are freed: of the keys `step` at a time all but the latest `keep`, of the values all but the
latest `keep_values`. With `chunk` the prompt is coded as it comes, at multiples of that many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kernels.reference_coded import Places, full_rows, places_in
from trimtab.kvcache.base import KVShape, StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.heads import HeadRows

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Coding:
    """How rows are coded, and which."""

    bits: int
    group: int  # numbers that share a scale and a zero
    by_token: bool  # groups of keys are channels of one token, not tokens of one channel
    keep: int = 0  # latest keys, and values, that stay in full
    keep_values: int = 0
    step: int = 1  # keys are coded this many at a time
    chunk: int = 0  # tokens of the prompt after which it is coded so far; 0 = at its end

    def due(self, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many keys and values of `length` are to be coded."""
        keys = np.maximum(length - self.keep, 0)
        return keys // self.step * self.step, np.maximum(length - self.keep_values, 0)


def coding_problems(name: str, bits: int, group: int, config: ModelConfig) -> list[str]:
    """Every reason why rows of a model cannot be coded so."""
    found = []
    if config.head_dim % group:
        found.append(f"{name}:group_size={group} does not divide the model's head size {config.head_dim}")
    if config.head_dim % PAGE and bits < 16:
        found.append(
            f"{name} packs {PAGE} channels at a time, and the model's head size is {config.head_dim}"
        )
    if any(config.sliding_windows):
        found.append("the model's own sliding-window layers already forget; use cache=full")
    return found


class CodedRows(HeadRows):
    """Tables and counts live on the CPU, [slots, L, G, ...]; codes and rows on the model's device.

    Four stores of pages: K and V in full, K and V coded. A head holds entries [first, end) of its tables.
    """

    chunks_generated: ClassVar[bool] = False

    def __init__(self, shape: KVShape, memory_bytes: int, notes_bytes: int, coding: Coding) -> None:
        self.shape, self.coding = shape, coding
        self._notes_bytes = notes_bytes
        layers, heads, d = shape.num_layers, shape.num_kv_heads, shape.head_dim
        blocks = (shape.max_length + shape.max_step_tokens) // PAGE + 1
        of_heads = (shape.max_sequences, layers, heads)
        tables = torch.zeros(4, *of_heads, blocks, dtype=torch.int32)
        counts = torch.zeros(3, *of_heads, dtype=torch.int32)
        rows = PagedRows(
            arena=torch.empty(0, dtype=shape.dtype),
            table=tables[0],
            start=counts[0],
            spans=torch.zeros(0, 3, dtype=torch.int32),
            num_heads=shape.num_heads,
            num_kv_heads=heads,
            head_dim=d,
            scale=shape.scale,
            table_seq=layers * heads * blocks,
            table_head=blocks,
            table_layer=heads * blocks,
            start_seq=layers * heads,
            start_head=1,
            start_layer=heads,
        )
        self._call = call = CodedTables(
            rows=rows,
            arena=torch.empty(0),
            v_full=tables[1],
            k_coded=tables[2],
            v_coded=tables[3],
            k_done=counts[1],
            v_done=counts[2],
            bits=coding.bits,
            group=coding.group,
            by_token=coding.by_token,
        )
        sizes = [call.full_bytes, call.full_bytes, call.k_bytes, call.v_bytes]
        slab = max(sizes) * min(64, memory_bytes // max(sizes) // 256)
        self.arena = Arena(memory_bytes, sizes, shape.device, min_slab=slab)
        self.pools = [PagePool(self.arena, size) for size in sizes]
        call.arena = self.arena.bytes
        rows.arena = self.arena.bytes.view(shape.dtype)
        self._whole = replace(call, rows=replace(rows))
        self.length = counts[0]
        # The same memory for numpy, whose calls on a dozen numbers cost a fraction of torch's.
        self._tables = [*tables.view(4, shape.max_sequences, layers * heads, blocks).numpy()]
        self._counts = counts.view(3, shape.max_sequences, layers * heads).numpy()
        self._first = np.zeros((4, shape.max_sequences, layers * heads), dtype=np.int32)
        self._end = np.zeros_like(self._first)
        self._prompt = [0] * shape.max_sequences
        self._tokens = [0] * shape.max_sequences  # committed, whether their rows are still held or not
        self._room = [0] * shape.max_sequences  # rows that surely need no further page
        self._moved = 0
        self._met = self.arena  # whose bound the last failed `reserve` met

    # --- memory

    def open(self, slot: int, prompt_length: int) -> None:
        self._counts[:, slot] = 0
        self._first[:, slot] = self._end[:, slot] = 0
        self._prompt[slot], self._tokens[slot], self._room[slot] = prompt_length, 0, 0

    def close(self, slot: int) -> None:
        self._counts[:, slot] = 0
        self._trim(slot)

    def fits(self, slot: int, count: int) -> bool:
        return count <= self._room[slot]

    def reserve(self, slot: int, count: int, beside: int = 0) -> bool:
        missing = np.maximum(self._needed(slot, count)[1] - self._end[:, slot], 0)
        wanted = missing.sum(1).tolist()
        if any(wanted):
            here = ((p, n) for p, n in zip(self.pools, wanted, strict=True) if p.arena is self.arena)
            used = sum((p.used + n) * p.page_bytes for p, n in here)
            self._met = self.arena
            notes = (int(self._end[0].sum()) + wanted[0]) * PAGE * self._notes_bytes
            if used + notes + beside > self.arena.total or not self._alloc(slot, missing, wanted):
                return False
        if self._tokens[slot] >= self._prompt[slot]:
            self._room[slot] = self._roomy(slot)
        return True

    def _needed(self, slot: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """First and end entries int32 [4, heads] of what must be held with `count` rows more."""
        length, k_done, v_done = self._counts[:, slot]
        rows = length + count
        keys, values = k_done, v_done
        if self._codes(slot, count):
            keys, values = self._due(slot, rows)
        pages = -(-rows // PAGE)
        none = np.zeros_like(pages)
        first = np.stack([k_done // PAGE, v_done // PAGE, none, none])
        return first, np.stack([pages, pages, -(-keys // self._call.k_unit), -(-values // PAGE)])

    def _codes(self, slot: int, count: int) -> bool:
        """Whether what is due may be coded when up to `count` tokens more are committed."""
        tokens, chunk = self._tokens[slot], self.coding.chunk
        if tokens + count >= self._prompt[slot]:
            return True
        return chunk > 0 and (tokens + count) // chunk > tokens // chunk

    def _due(self, slot: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self.coding.due(rows)
        return np.maximum(keys, self._counts[1, slot]), np.maximum(values, self._counts[2, slot])

    def _alloc(self, slot: int, missing: np.ndarray, wanted: list[int]) -> bool:
        taken: list[list[int]] = []
        for pool, n in zip(self.pools, wanted, strict=True):
            pages = pool.alloc_many(n)
            if pages is None:
                self._met = pool.arena
                for other, some in zip(self.pools, taken, strict=False):
                    other.free(some)
                return False
            taken.append(pages)
        for store, pages in enumerate(taken):
            if pages:
                end = self._end[store, slot]
                head, entry = _entries(end, end + missing[store])
                self._tables[store][slot, head, entry] = pages
        self._end[:, slot] += missing
        return True

    def _trim(self, slot: int) -> None:
        """Give back all pages that are not needed."""
        old_first, old_end = self._first[:, slot], self._end[:, slot]
        first, end = self._needed(slot, 0)
        if (first == old_first).all() and (end == old_end).all():
            return
        # What is held and needed; where that is nothing, the next page is the first one needed.
        from_, to = np.maximum(first, old_first), np.minimum(end, old_end)
        empty = from_ >= to
        from_, to = np.where(empty, old_end, from_), np.where(empty, old_end, to)
        for store, pool in enumerate(self.pools):
            for a, b in ((old_first, from_), (to, old_end)):
                head, entry = _entries(a[store], b[store])
                if len(head):
                    pool.free(self._tables[store][slot, head, entry].tolist())
        self._first[:, slot], self._end[:, slot] = np.where(empty, first, from_), np.where(empty, first, to)
        self._room[slot] = 0

    def _roomy(self, slot: int) -> int:
        """Rows that fit into the pages held, those for coding included."""
        c, end = self.coding, self._end[:, slot]
        most_keys = end[2] * self._call.k_unit // c.step * c.step + c.step - 1 + c.keep
        most = np.minimum(np.minimum(end[0] * PAGE, most_keys), end[3] * PAGE + c.keep_values)
        return int((most - self._counts[0, slot]).min())

    def most_rows(self, slot: int, count: int) -> int:
        chunk, tokens = self.coding.chunk, self._tokens[slot]
        return min(count, chunk - tokens % chunk) if chunk and tokens < self._prompt[slot] else count

    # --- a step

    def call(
        self, layer: int, spans: Tensor, start: Tensor | None = None, mask: Tensor | None = None
    ) -> CodedTables:
        """Where layer `layer`'s rows lie; `start` (shaped like `length`) replaces the committed lengths."""
        rows = self._call.rows
        rows.spans, rows.mask = spans, mask
        rows.start = self.length if start is None else start
        rows.table_offset, rows.start_offset = layer * rows.table_layer, layer * rows.start_layer
        return self._call

    def write(self, layer: int, k: Tensor, v: Tensor, rows: StepRows) -> None:
        self.shape.kernels.write_coded(self.call(layer, rows.spans), k, v)

    def attend(self, layer: int, q: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        return self.shape.kernels.attend_coded(self.call(layer, rows.spans, mask=rows.mask), q)

    def column_sums(
        self,
        layer: int,
        q: Tensor,
        spans: Tensor,
        sums: Tensor,
        lse: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        call = self.call(layer, spans, start)
        if lse is None:
            lse = self.shape.kernels.attend_coded(call, q)[1]
        self.shape.kernels.column_sums_coded(call, q, lse, sums)

    def whole_step(self, rows: StepRows) -> CodedTables:
        call = self._whole
        call.rows.spans, call.rows.mask = rows.spans, rows.mask
        return call

    def arrange(self, slot: int, order: Seq[int]) -> None:
        base = self.length[slot].long()[..., None]
        target = base + torch.arange(len(order))
        self._scatter(slot, target, *self._gather_full(slot, base + torch.tensor(list(order))))

    def grow(self, slot: int, count: int) -> None:
        self._counts[0, slot] += count
        self._tokens[slot] += count
        self._room[slot] -= count
        tokens, chunk = self._tokens[slot], self.coding.chunk
        if chunk and tokens < self._prompt[slot] and tokens % chunk == 0:
            self._moved += self._code(slot)

    def tables(self, slot: int) -> CodedTables:
        """Where the rows of a text lie."""
        return self._call

    def settle(self, slot: int) -> int:
        moved, self._moved = self._moved + self._code(slot), 0
        return moved

    def _code(self, slot: int) -> int:
        """Code what is due, free its pages, and say how many bytes were read."""
        length, k_done, v_done = self._counts[:, slot]
        keys, values = self._due(slot, length)
        new = int((keys + values - k_done - v_done).sum())
        if not new:
            return 0
        whole = (keys != k_done).any() or (values // PAGE != v_done // PAGE).any()
        s = self.shape
        k_to, v_to = (torch.from_numpy(x).view(s.num_layers, s.num_kv_heads) for x in (keys, values))
        self.call(0, self._call.rows.spans)
        s.kernels.code(self.tables(slot), slot, s.num_layers, k_to, v_to)
        self._counts[1, slot], self._counts[2, slot] = keys, values
        if whole:  # rows of a page that is still read free nothing
            self._trim(slot)
        return new * s.row_bytes // 2

    # --- choosing

    def gather(self, slot: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [L, G, n, d] of rows `index` int64 [L, G, n], as attention sees them."""
        k, v = self._gather_full(slot, index)
        for x, keys in ((k, True), (v, False)):
            coded = index < (self._call.k_done if keys else self._call.v_done)[slot][..., None]
            if coded.any():
                x[coded] = self._places(slot, index, coded, keys).load().to(x)
        return k, v

    def layer_rows(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        length = self.length[slot, layer]
        assert not self._counts[1:, slot].any(), "rows are packed already"
        index = torch.arange(int(length.max())).expand(len(length), -1)
        k, v = (
            f.rows[f.table[slot, layer].long().gather(1, index // PAGE), index % PAGE].float()
            for f in full_rows(self.tables(slot))
        )
        return k, v

    def keep(self, slot: int, index: Tensor, count: Tensor | None = None) -> int:
        n = index.shape[2]
        if count is None:
            count = torch.full(index.shape[:2], n)
        target = torch.arange(n).expand_as(index)
        moved = self._move(slot, index, target, target < count[..., None])
        self._shorten(slot, count)
        return moved

    def replace(self, slot: int, victim: Tensor) -> int:
        last = self.length[slot].long() - 1
        which = torch.ones_like(last, dtype=torch.bool)[..., None]
        moved = self._move(slot, last[..., None], victim[..., None], which)
        self._shorten(slot, last)
        return moved

    def _shorten(self, slot: int, count: Tensor) -> None:
        self.length[slot] = count
        for done in (self._call.k_done, self._call.v_done):
            done[slot] = torch.minimum(done[slot], self.length[slot])
        self._trim(slot)

    def _move(self, slot: int, source: Tensor, target: Tensor, which: Tensor) -> int:
        """Copy rows `source` to `target` (int64 [L, G, n], where `which` is set); returns bytes."""
        if not self._counts[1:, slot].any():
            k, v = self._gather_full(slot, source)
            self._scatter(slot, target, k, v, which)
            return int(which.sum()) * self.shape.row_bytes
        assert self.coding.by_token and not self.coding.keep, "coded rows that cannot be moved one by one"
        self._code(slot)
        moves = [
            (self._places(slot, source, which, keys), self._places(slot, target, which, keys))
            for keys in (True, False)
        ]
        for old, new in moves:
            old.move(new)
        d, c = self.shape.head_dim, self.coding
        return int(which.sum()) * 2 * (d * c.bits // 8 + d // c.group * 4)

    def _places(self, slot: int, index: Tensor, which: Tensor, keys: bool) -> Places:
        """Where the coded rows index[which] lie, in that order."""
        unit, table = (self._call.k_unit, self._call.k_coded) if keys else (PAGE, self._call.v_coded)
        page = table[slot].long().gather(2, index.clamp(min=0) // unit)
        return places_in(self.tables(slot), page[which], (index % unit)[which], keys)

    def _gather_full(self, slot: int, index: Tensor) -> tuple[Tensor, Tensor]:
        at = index % PAGE
        full = full_rows(self.tables(slot))
        k, v = (f.rows[f.table[slot].long().gather(2, index // PAGE), at] for f in full)
        return k, v.to(k.device)

    def _scatter(self, slot: int, index: Tensor, k: Tensor, v: Tensor, which: Tensor | None = None) -> None:
        for full, x in zip(full_rows(self.tables(slot)), (k, v), strict=True):
            page, at = full.table[slot].long().gather(2, index // PAGE), index % PAGE
            if which is None:
                full.rows[page, at] = x.to(full.rows.device)
            else:
                full.rows[page[which], at[which]] = x[which.to(x.device)].to(full.rows.device)

    # --- meters

    @property
    def coded_value_bytes(self) -> int:
        """Of 16 coded rows of values of one head."""
        return self._call.v_bytes

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_used(self) -> int:
        return self._bytes([pool.used for pool in self.pools], self.arena)

    def held(self, slot: int) -> int:
        return self._bytes(self._pages(slot), self.arena)

    def _pages(self, slot: int) -> list[int]:
        return (self._end[:, slot] - self._first[:, slot]).sum(1).tolist()

    def _bytes(self, pages: list[int], arena: Arena) -> int:
        """Of so many pages of each store, those that lie in `arena`."""
        of_stores = zip(pages, self.pools, strict=True)
        return sum(n * pool.page_bytes for n, pool in of_stores if pool.arena is arena)

    def read(self, slot: int) -> int:
        length, k_done, v_done = self._counts[:, slot]
        coded = -(-k_done // self._call.k_unit) * self._call.k_bytes + -(-v_done // PAGE) * self._call.v_bytes
        full = (2 * length - k_done - v_done) * (self.shape.row_bytes // 2)
        return int((coded + full).sum())

    def check(self) -> None:
        self.arena.check()
        pages = (self._end - self._first).sum((1, 2)).tolist()
        assert pages == [p.used for p in self.pools], "pages held by heads and pages used differ"


def _entries(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heads and entries of ranges [first, end) (int32 [heads]), one range after another."""
    count = np.maximum(end - first, 0)
    total = int(count.sum())
    head = np.repeat(np.arange(len(count)), count)
    return head, np.arange(total) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
