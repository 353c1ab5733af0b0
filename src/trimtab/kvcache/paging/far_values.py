"""Rows kept head by head whose values move to host memory once the prompt is complete.

K and V lie in pages of their own. All pages are the device's while the prompt is computed; when it is
complete the values of layers from `near_layers` on move to the host and their device pages are free. From
then on a row is answered by the values of its largest probabilities alone (`kernels.attend_top`). Host pages
are taken along with the device's, so the move cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.host import some_spans
from trimtab.kvcache.paging.per_head import _ALL, PerHeadRows
from trimtab.sizes import format_bytes


class FarValues(PerHeadRows):
    """Takes over the memory and the tables of `rows`, which nobody may have used.

    `host`: an arena of pages of 16 values. `top`: values fetched for each query head.
    """

    chunks_generated = False  # rows of the prompt see all values, rows behind it do not

    def __init__(
        self, rows: PerHeadRows, host: Arena, top: int, renormalize: bool = False, near_layers: int = 0
    ) -> None:
        vars(self).update(vars(rows))
        s = self.shape
        half = PAGE * s.row_bytes // 2
        self.pool = PagePool(self.arena, half)
        self._note_bytes = self._page_cost - 2 * half  # what the policy keeps beside a page of rows
        self.host = host
        self.host_pool = PagePool(host, half)
        self.top, self.renormalize, self.near_layers = top, renormalize, min(near_layers, s.num_layers)
        self.far = torch.zeros(s.max_sequences, s.num_layers, dtype=torch.bool)
        self.value_table, self.host_table = torch.zeros_like(self.table), torch.zeros_like(self.table)
        for call in (self._call, self._whole):
            call.values, call.value_table = self.pool.view(s.dtype), self.value_table
        self._lacking: str | None = None

    def open(self, slot: int, prompt_length: int = 0) -> None:
        super().open(slot, prompt_length)
        self.far[slot] = False

    def reserve(self, slot: int, count: int, beside: int = 0) -> bool:
        need = (self.length[slot] + (count + PAGE - 1)) // PAGE
        have = self._pages[slot]
        missing = (need - have).clamp(min=0)
        keys = int(missing.sum())
        if not keys:
            return True
        near, far = missing * ~self.far[slot, :, None], missing.clone()
        far[: self.near_layers] = 0
        device, host = keys + int(near.sum()), int(far.sum())
        notes = (int(self._pages.sum()) + keys) * self._note_bytes + beside
        self._lacking = None
        if (self.pool.used + device) * self.pool.page_bytes + notes > self.arena.total:
            return False
        if device > self.pool.available:
            return False
        if host > self.host_pool.available:
            self._lacking = f"{self.host.setting} is {format_bytes(self.host.total)}"
            return False
        for pool, table, pages in (
            (self.pool, self.table, missing),
            (self.pool, self.value_table, near),
            (self.host_pool, self.host_table, far),
        ):
            taken = pool.alloc_many(int(pages.sum()))
            assert taken is not None
            self._enter(table[slot], have, pages, taken)
        self._pages[slot] = torch.maximum(need, have)
        self._resized(slot)
        return True

    # --- a step

    def _values_in(self, call: PagedRows, host: bool) -> PagedRows:
        call.values = (self.host_pool if host else self.pool).view(self.shape.dtype)
        call.value_table = self.host_table if host else self.value_table
        return call

    def _calls(self, layer: int, rows: StepRows) -> Iterator[tuple[bool, PagedRows]]:
        """(whether the values are in host memory, where the rows lie) for the spans of either kind."""
        for host in (False, True):
            spans, mask = some_spans(rows, lambda s, h=host: bool(self.far[s.slot, layer]) == h)
            if len(spans):
                yield host, self._values_in(self.call(layer, spans, mask=mask, depth=rows.depth), host)

    def write(self, layer: int, k: Tensor, v: Tensor, rows: StepRows) -> None:
        for _, call in self._calls(layer, rows):
            self.shape.kernels.write(call, k, v)

    def attend(self, layer: int, q: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        kernels, parts = self.shape.kernels, []
        for host, call in self._calls(layer, rows):
            if host:
                out, lse, fetched = kernels.attend_top(call, q, self.top, self.renormalize)
                self.fetched += int(fetched.sum()) * self.shape.row_bytes // 2
                parts.append((out, lse))
            else:
                parts.append(kernels.attend(call, q))
        lse = parts[0][1] if len(parts) == 1 else torch.maximum(parts[0][1], parts[1][1])
        return kernels.merge(parts), lse  # each row is in one of the parts alone

    def column_sums(
        self,
        layer: int,
        q: Tensor,
        spans: Tensor,
        sums: Tensor,
        lse: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        self._values_in(self._call, False)
        super().column_sums(layer, q, spans, sums, lse, start)

    def whole_step(self, rows: StepRows) -> PagedRows | None:
        """Steps of prompts alone."""
        return None if self.far[[s.slot for s in rows.sequences]].any() else super().whole_step(rows)

    def settle(self, slot: int) -> int:
        """Move the values to the host."""
        layers = slice(self.near_layers, None)
        if self.far[slot, layers].all():
            return 0
        held = torch.arange(self.per_head) < self._pages[slot, layers, :, None]
        near = self.value_table[slot, layers][held].long()
        source, target = self._values(self.pool), self._values(self.host_pool)
        target[self.host_table[slot, layers][held].long()] = source[near.to(source.device)].to(target.device)
        self.pool.free(near.tolist())
        self.far[slot, layers] = True
        return near.numel() * self.pool.page_bytes

    # --- choosing

    def _values(self, pool: PagePool) -> Tensor:
        """All pages of values, [pages, 16, d]."""
        return pool.view(self.shape.dtype).view(-1, PAGE, self.shape.head_dim)

    def _halves(self, slot: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Where values are, layers by layers: (layers, pages [pages, 16, d], table [layers, G, pages])."""
        first = self.near_layers if self.far[slot].any() else self.shape.num_layers
        for layers, pool, table in (
            (slice(None, first), self.pool, self.value_table),
            (slice(first, None), self.host_pool, self.host_table),
        ):
            yield layers, self._values(pool), table[slot, layers].long()

    def _keys(self, slot: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        pages = self.pool.view(s.dtype).view(-1, s.head_dim, PAGE)
        page, at = _place(self.table[slot].long(), index)
        return pages, page.to(s.device), at.to(s.device)

    def gather(self, slot: int, index: Tensor, layers: slice = _ALL) -> tuple[Tensor, Tensor]:
        assert layers == _ALL
        keys, page, at = self._keys(slot, index)
        found = []
        for layers, values, table in self._halves(slot):
            where = (x.to(values.device) for x in _place(table, index[layers]))
            found.append(values[tuple(where)].to(keys.device))
        return keys[page, :, at], torch.cat(found)

    def layer_rows(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        n = int(self.length[slot, layer].max())
        index = torch.arange(n).expand(*self.length.shape[1:], n)
        k, v = self.gather(slot, index)
        return k[layer].float(), v[layer].float()

    def scatter(self, slot: int, index: Tensor, k: Tensor, v: Tensor, layers: slice = _ALL) -> None:
        assert layers == _ALL
        keys, page, at = self._keys(slot, index)
        keys[page, :, at] = k
        for layers, values, table in self._halves(slot):
            where = (x.to(values.device) for x in _place(table, index[layers]))
            values[tuple(where)] = v[layers].to(values.device)

    def _shrink(self, slot: int, spare: int = 0) -> None:
        need = ((self.length[slot] + (PAGE - 1 + spare)) // PAGE).minimum(self._pages[slot])
        at = torch.arange(self.per_head)
        extra = (at >= need[..., None]) & (at < self._pages[slot, :, :, None])
        near, far = extra & ~self.far[slot, :, None, None], extra.clone()
        far[: self.near_layers] = False
        self.pool.free(self.table[slot][extra].tolist() + self.value_table[slot][near].tolist())
        self.host_pool.free(self.host_table[slot][far].tolist())
        self._pages[slot] = need
        self._resized(slot)

    # --- meters

    def _near_pages(self, slot: int) -> int:
        return int((self._pages[slot] * ~self.far[slot, :, None]).sum())

    def _far_pages(self, slot: int) -> int:
        return int(self._pages[slot, self.near_layers :].sum())

    @property
    def bytes_host(self) -> int:
        return self.host_pool.bytes_used

    @property
    def exhausted(self) -> str | None:
        return self._lacking

    def held(self, slot: int) -> int:
        return (int(self._pages[slot].sum()) + self._near_pages(slot)) * self.pool.page_bytes

    def host_held(self, slot: int) -> int:
        return self._far_pages(slot) * self.host_pool.page_bytes

    def read(self, slot: int) -> int:
        """All keys, and at most `top` rows of values for each query head."""
        s, length = self.shape, self.length[slot]
        most = torch.where(self.far[slot, :, None], self.top * (s.num_heads // s.num_kv_heads), s.max_length)
        return int((length + length.minimum(most)).sum()) * s.row_bytes // 2

    def check(self) -> None:
        self.arena.check()
        self.host.check()
        slots = range(self.shape.max_sequences)
        device = int(self._pages.sum()) + sum(map(self._near_pages, slots))
        assert device == self.pool.used, "pages held by heads and pages used differ"
        assert sum(map(self._far_pages, slots)) == self.host_pool.used, "and in host memory"


def _place(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Page and place in the page of rows `index` int64 [L, G, n], by `table` [L, G, pages]."""
    return table.gather(2, index // PAGE), index % PAGE
