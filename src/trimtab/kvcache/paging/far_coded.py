"""Rows of which the older part is coded, and whose values move to host memory once the prompt is complete.

`FarValues` on `CodedRows`. While the prompt is computed all its rows are in full and the device's. When it is
complete the values move to the host, where they are coded as they are due and where later ones go too. From
then on a row is answered by the values of its largest probabilities alone, which cross as they lie there: of
coded ones the codes and constants, others in full. Host pages are taken by the step that may complete the
prompt, so the move cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.coded import CodedRows, _entries
from trimtab.kvcache.paging.host import some_spans
from trimtab.sizes import format_bytes

_NEAR, _CODED, _FAR = 1, 3, 4  # stores of values: in full on the device, coded, in full in host memory


class FarCodedRows(CodedRows):
    """Takes over the memory and the tables of `rows`, which nobody may have used and whose prompts are coded
    as a whole.

    `host`: an arena of pages of 16 values, in full and coded. `top`: values fetched for each query head.
    """

    def __init__(self, rows: CodedRows, host: Arena, top: int, renormalize: bool = False) -> None:
        assert not rows.coding.chunk
        vars(self).update(vars(rows))
        s, call = self.shape, self._call
        self.host, self.top, self.renormalize = host, top, renormalize
        self.arena.pools.remove(self.pools[_CODED])
        self.pools[_CODED:] = [PagePool(host, call.v_bytes), PagePool(host, call.full_bytes)]
        self._values_at = {
            False: (call.v_full, self.arena.bytes),
            True: (torch.zeros_like(call.v_full), host.bytes),
        }
        self._tables.append(self._values_at[True][0].view(self._tables[0].shape).numpy())
        self._first = np.zeros((5, *self._first.shape[1:]), dtype=np.int32)
        self._end = np.zeros_like(self._first)
        self._far = [False] * s.max_sequences
        # A device with memory of its own gets codes unpacked to bytes (reference_coded.py: Places.load).
        coded = call.v_bytes // PAGE if s.device.type == "cpu" else s.head_dim + 4 * s.head_dim // call.group
        self._crossing = torch.tensor([coded, s.row_bytes // 2])  # bytes of a row, coded and in full

    def open(self, slot: int, prompt_length: int) -> None:
        super().open(slot, prompt_length)
        self._far[slot] = False

    def _needed(self, slot: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        first, end = (np.concatenate([x, x[_NEAR : _NEAR + 1]]) for x in super()._needed(slot, count))
        if self._far[slot]:
            first[_NEAR] = end[_NEAR] = 0
        elif not self._codes(slot, count):
            end[_FAR] = 0
        return first, end

    # --- a step

    def tables(self, slot: int) -> CodedTables:
        return self._values_in(self._call, self._far[slot])

    def _values_in(self, call: CodedTables, host: bool) -> CodedTables:
        call.v_full, call.v_arena = self._values_at[host]
        return call

    def _calls(self, layer: int, rows: StepRows) -> Iterator[tuple[bool, CodedTables]]:
        """(whether the values are in host memory, where the rows lie) for the spans of either kind."""
        for host in (False, True):
            spans, mask = some_spans(rows, lambda s, h=host: self._far[s.slot] == h)
            if len(spans):
                yield host, self._values_in(self.call(layer, spans, mask=mask), host)

    def write(self, layer: int, k: Tensor, v: Tensor, rows: StepRows) -> None:
        for _, call in self._calls(layer, rows):
            self.shape.kernels.write_coded(call, k, v)

    def attend(self, layer: int, q: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        kernels, parts = self.shape.kernels, []
        for host, call in self._calls(layer, rows):
            parts.append(self._top(call, q, self.top) if host else kernels.attend_coded(call, q))
        lse = parts[0][1] if len(parts) == 1 else torch.maximum(parts[0][1], parts[1][1])
        return kernels.merge(parts), lse  # each row is in one of the parts alone

    def _top(self, call: CodedTables, q: Tensor, n: int) -> tuple[Tensor, Tensor]:
        out, lse, fetched = self.shape.kernels.attend_top_coded(call, q, n, self.renormalize)
        self.fetched += int((fetched * self._crossing).sum())
        return out, lse

    def column_sums(
        self,
        layer: int,
        q: Tensor,
        spans: Tensor,
        sums: Tensor,
        lse: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        [slot] = spans[:, 0].unique().tolist()
        call = self.tables(slot)
        if lse is None and self._far[slot]:  # one value is the least that can be asked for
            self.call(layer, spans, start)
            lse = self._top(call, q, 1)[1]
        super().column_sums(layer, q, spans, sums, lse, start)

    def whole_step(self, rows: StepRows) -> PagedRows | CodedTables | None:
        """Steps of prompts alone."""
        return None if any(self._far[s.slot] for s in rows.sequences) else super().whole_step(rows)

    def settle(self, slot: int) -> int:
        """Move the values to the host, once, and code what is due."""
        if self._far[slot]:
            return super().settle(slot)
        head, entry = _entries(self._first[_NEAR, slot], self._end[[_NEAR, _FAR], slot].min(0))
        source, target = (torch.from_numpy(self._tables[x][slot, head, entry]).long() for x in (_NEAR, _FAR))
        near, far = (
            memory.view(self.shape.dtype).view(-1, PAGE, self.shape.head_dim)
            for memory in (self.arena.bytes, self.host.bytes)
        )
        moved = near[source.to(near.device)]
        far[target] = moved.to(far.device)
        self._far[slot] = True
        coded = super().settle(slot)
        self._trim(slot)
        return moved.nbytes + coded

    # --- meters

    @property
    def bytes_host(self) -> int:
        return self._bytes([pool.used for pool in self.pools], self.host)

    @property
    def exhausted(self) -> str | None:
        host = self.host
        return f"{host.setting} is {format_bytes(host.total)}" if self._met is host else None

    def host_held(self, slot: int) -> int:
        return self._bytes(self._pages(slot), self.host)

    def read(self, slot: int) -> int:
        """All keys, and of the values at most `top` rows for each query head."""
        if not self._far[slot]:
            return super().read(slot)
        length, k_done, v_done = self._counts[:, slot]
        call, half = self._call, self.shape.row_bytes // 2
        keys = -(-k_done // call.k_unit) * call.k_bytes + (length - k_done) * half
        most = self.top * (self.shape.num_heads // self.shape.num_kv_heads)
        full = np.minimum(length - v_done, most)
        coded = np.minimum(v_done, most - full)
        return int((keys + full * half + coded * (call.v_bytes // PAGE)).sum())

    def check(self) -> None:
        super().check()
        self.host.check()
