"""Rows kept head by head: every layer's every KV head has its own pages and its own length.

What eviction policies stand on. Keys are stored rotated, so the order of rows inside a head does not
matter and a freed row can be filled by any other; whole free pages go back to the pool at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import KVShape, StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.heads import HeadRows

_ALL = slice(None)


class PerHeadRows(HeadRows):
    """Paged K and V rows per (slot, layer, head). Tables live on the CPU; rows on the model's device.

    `notes_bytes`: what the policy keeps for each row elsewhere; it counts against the bound too.
    """

    def __init__(
        self, shape: KVShape, memory_bytes: int, notes_bytes: int = 0, arena: Arena | None = None
    ) -> None:
        self.shape = shape
        page_bytes = PAGE * shape.row_bytes
        self._page_cost = page_bytes + PAGE * notes_bytes
        # Few slabs where there is much memory; where there is little, none lost to rounding down.
        slab = page_bytes * min(64, memory_bytes // page_bytes // 64)
        self.arena = arena or Arena(memory_bytes, [page_bytes], shape.device, min_slab=slab)
        self.pool = PagePool(self.arena, page_bytes)
        self.per_head = (shape.max_length + shape.max_step_tokens) // PAGE + 1
        heads = (shape.max_sequences, shape.num_layers, shape.num_kv_heads)
        self.table = torch.zeros(*heads, self.per_head, dtype=torch.int32)
        self.length = torch.zeros(*heads, dtype=torch.int32)  # committed rows
        self._pages = torch.zeros(*heads, dtype=torch.int32)  # pages held, and dropped ones between them
        self._dropped = torch.zeros(*heads, dtype=torch.int32)
        self._room = [0] * shape.max_sequences  # rows that every head of a text surely has pages for
        self._held: list[int | None] = [0] * shape.max_sequences  # pages of a text, where known
        # The same memory for numpy, whose calls cost a fraction of torch's: `grow` runs for every token.
        self._length = self.length.numpy()
        self._window = torch.zeros(heads[1:], dtype=torch.int32)  # 0 = the head sees all its rows
        self._sinks = 0
        self._call = PagedRows(
            arena=self.pool.view(shape.dtype),
            table=self.table,
            start=self.length,
            spans=torch.zeros(0, 3, dtype=torch.int32),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            table_seq=shape.num_layers * shape.num_kv_heads * self.per_head,
            table_head=self.per_head,
            table_layer=shape.num_kv_heads * self.per_head,
            start_seq=shape.num_layers * shape.num_kv_heads,
            start_head=1,
            start_layer=shape.num_kv_heads,
        )
        self._whole = replace(self._call)

    def open(self, slot: int, prompt_length: int = 0) -> None:
        self.length[slot] = 0
        self._pages[slot] = 0
        self._dropped[slot] = 0
        self._resized(slot)

    def _resized(self, slot: int) -> None:
        self._room[slot] = int((self._pages[slot] * PAGE - self.length[slot]).min())
        self._held[slot] = None

    def look_back(self, window: Tensor, sinks: int) -> None:
        """Let a row of head (l, g) see the first `sinks` rows and the latest `window[l, g]`, itself included.

        `window` int32 [L, G], 0 = all; to be said before the first row. `drop_unseen` frees the others.
        """
        self._window, self._sinks = window, sinks
        for call in (self._call, self._whole):
            call.head_window, call.head_sinks = window.flatten(), torch.full_like(window, sinks).flatten()

    def drop_unseen(self, slot: int) -> None:
        """Free the pages that no later row sees.

        Rows keep their places, so that sums go on in the same order. The first page always stays: a
        dropped one's entry in the table points there, since kernels may read what they then mask.
        """
        first = self._first_dropped
        unseen = (self.length[slot] + 1 - self._window) // PAGE - first
        unseen = torch.where(self._window > 0, unseen, 0)
        freed: list[int] = []
        for layer, head in (unseen > self._dropped[slot]).nonzero().tolist():
            table, more = (
                self.table[slot, layer, head],
                slice(first + int(self._dropped[slot, layer, head]), first + int(unseen[layer, head])),
            )
            freed += table[more].tolist()
            table[more] = table[0]
        self.pool.free(freed)
        self._dropped[slot] = torch.maximum(self._dropped[slot], unseen)
        self._held[slot] = None

    @property
    def _first_dropped(self) -> int:
        return max(1, -(-self._sinks // PAGE))

    def fits(self, slot: int, count: int) -> bool:
        return count <= self._room[slot]

    def reserve(self, slot: int, count: int, beside: int = 0) -> bool:
        """Room for `count` rows more in every head while the policy holds `beside` bytes elsewhere.

        False, and nothing changed, if there is none.
        """
        need = (self.length[slot] + (count + PAGE - 1)) // PAGE
        have = self._pages[slot]
        missing = (need - have).clamp(min=0)
        total = int(missing.sum())
        if not total:
            return True
        if (self.pool.used + total) * self._page_cost + beside > self.arena.total:
            return False
        pages = self.pool.alloc_many(total)
        if pages is None:
            return False
        self._enter(self.table[slot], have, missing, pages)
        self._pages[slot] = torch.maximum(need, have)
        self._resized(slot)
        return True

    @staticmethod
    def _enter(table: Tensor, have: Tensor, missing: Tensor, pages: list[int]) -> None:
        """Name `pages` in each head's row of `table` behind those it has."""
        at = 0
        for layer, head in missing.nonzero().tolist():
            n, first = int(missing[layer, head]), int(have[layer, head])
            table[layer, head, first : first + n] = torch.tensor(pages[at : at + n], dtype=torch.int32)
            at += n

    def call(
        self,
        layer: int,
        spans: Tensor,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> PagedRows:
        """Where layer `layer`'s rows lie; `start` (shaped like `length`) replaces the committed lengths."""
        call = self._call
        call.spans, call.mask, call.depth = spans, mask, depth
        call.start = self.length if start is None else start
        call.table_offset = layer * self.shape.num_kv_heads * self.per_head
        call.start_offset = layer * self.shape.num_kv_heads
        call.head_offset = call.start_offset
        call.window = self.shape.windows[layer] or 0
        return call

    def write(self, layer: int, k: Tensor, v: Tensor, rows: StepRows) -> None:
        self.shape.kernels.write(self.call(layer, rows.spans), k, v)

    def attend(self, layer: int, q: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        return self.shape.kernels.attend(self.call(layer, rows.spans, mask=rows.mask, depth=rows.depth), q)

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
            lse = self.shape.kernels.attend(call, q)[1]
        self.shape.kernels.column_sums(call, q, lse, sums)

    def whole_step(self, rows: StepRows) -> PagedRows:
        call = self._whole
        call.spans, call.mask, call.depth = rows.spans, rows.mask, rows.depth
        return call

    def grow(self, slot: int, count: int) -> None:
        self._length[slot] += count
        self._room[slot] -= count

    def _views(self) -> tuple[Tensor, Tensor]:
        """Keys [pages, d, 16] and values [pages, 16, d] of the whole arena."""
        d = self.shape.head_dim
        pages = self._call.arena.view(-1, 2, PAGE * d)
        return pages[:, 0].unflatten(-1, (d, PAGE)), pages[:, 1].unflatten(-1, (PAGE, d))

    def _locate(self, slot: int, index: Tensor, layers: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Page and place in the page of rows `index` int64 [layers, G, n]."""
        page = torch.gather(self.table[slot, layers].long(), 2, index // PAGE)
        device = self._call.arena.device
        return page.to(device), (index % PAGE).to(device)

    def gather(self, slot: int, index: Tensor, layers: slice = _ALL) -> tuple[Tensor, Tensor]:
        """k and v [layers, G, n, d] of rows `index` int64 [layers, G, n]."""
        keys, values = self._views()
        page, at = self._locate(slot, index, layers)
        return keys[page, :, at], values[page, at]

    def layer_rows(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self._views()
        pages = -(-int(self.length[slot, layer].max()) // PAGE)
        held = self.table[slot, layer, :, :pages].long().to(keys.device)
        return keys[held].transpose(2, 3).flatten(1, 2).float(), values[held].flatten(1, 2).float()

    def pick(self, slot: int, layer: int, index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [m, d] of those of one layer's rows `index` int64 [G, n] that are `wanted`."""
        keys, values = self._views()
        page, at = (x[0][wanted] for x in self._locate(slot, index[None], slice(layer, layer + 1)))
        return keys[page, :, at], values[page, at]

    def scatter(self, slot: int, index: Tensor, k: Tensor, v: Tensor, layers: slice = _ALL) -> None:
        keys, values = self._views()
        page, at = self._locate(slot, index, layers)
        keys[page, :, at] = k
        values[page, at] = v

    def arrange(self, slot: int, order: Seq[int]) -> None:
        base = self.length[slot].long()[..., None]
        k, v = self.gather(slot, base + torch.tensor(list(order)))
        self.scatter(slot, base + torch.arange(len(order)), k, v)

    def keep(self, slot: int, index: Tensor, count: Tensor | None = None) -> int:
        k, v = self.gather(slot, index)
        n = index.shape[2]
        if count is None:
            count = torch.full(index.shape[:2], n)
        # Heads that keep fewer rows have none to write behind them: their last row is written again.
        at = torch.minimum(torch.arange(n).expand_as(index), count[..., None] - 1)
        last = at[..., None].to(k.device).expand_as(k)
        self.scatter(slot, at, k.gather(2, last), v.gather(2, last))
        self.length[slot] = count
        self._shrink(slot)
        return 2 * int(count.sum()) * k.shape[-1] * k.element_size()

    def replace(self, slot: int, victim: Tensor) -> int:
        last = (self.length[slot].long() - 1)[..., None]
        k, v = self.gather(slot, last)
        self.scatter(slot, victim[..., None], k, v)
        self.cut(slot, 1)
        return 2 * k.numel() * k.element_size()

    def cut(self, slot: int, count: int) -> None:
        """Forget the last `count` rows of every head; the page of the row to come is kept."""
        self._length[slot] -= count
        self._room[slot] += count
        if self._room[slot] > PAGE:
            self._shrink(slot, spare=1)

    def _shrink(self, slot: int, spare: int = 0) -> None:
        """Give back pages behind those of the rows held and of `spare` more."""
        need = ((self.length[slot] + (PAGE - 1 + spare)) // PAGE).minimum(self._pages[slot])
        extra = self._pages[slot] - need
        freed: list[int] = []
        for layer, head in extra.nonzero().tolist():
            first, end = int(need[layer, head]), int(self._pages[slot, layer, head])
            gap = int(self._dropped[slot, layer, head])
            held = self.table[slot, layer, head].tolist()
            held[self._first_dropped : self._first_dropped + gap] = [-1] * gap
            freed += [page for page in held[first:end] if page >= 0]
        self.pool.free(freed)
        self._pages[slot] = need
        self._resized(slot)

    def give_back(self, slot: int) -> None:
        """Free what was reserved behind the committed rows."""
        self._shrink(slot)

    def close(self, slot: int) -> None:
        self.length[slot] = 0
        self._shrink(slot)
        self._dropped[slot] = 0
        self._held[slot] = 0

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_used(self) -> int:
        return self.pool.bytes_used

    def held(self, slot: int) -> int:
        held = self._held[slot]
        if held is None:
            held = self._held[slot] = int((self._pages[slot] - self._dropped[slot]).sum())
        return held * self.pool.page_bytes

    def read(self, slot: int) -> int:
        length = self.length[slot]
        seen = torch.where(self._window > 0, length.clamp(max=self._window + self._sinks), length)
        return int(seen.sum()) * self.shape.row_bytes

    def check(self) -> None:
        self.arena.check()
        assert int((self._pages - self._dropped).sum()) == self.pool.used, (
            "pages held by heads and pages used differ"
        )
