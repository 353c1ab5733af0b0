"""Where rows lie in pages: the one description that the C++ and the torch kernels both read.

A page holds 16 tokens of one layer's one KV head, K as [d, 16] and then V as [16, d]. The page of
sequence `s`, head `g`, page index `j` is `table[offset + s * table_seq + g * table_head + j] * page_mul +
page_add + g * page_head`. With a table per sequence and page_mul = layers * heads one entry stands for all
layers and heads (`full`); with a table per head every head has a length of its own (eviction). With
`values` K and V lie apart, in pages of [d, 16] and of [16, d] that may be in different memory.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

PAGE = 16


class Paged(ctypes.Structure):
    """`PagedRows` as the C++ side reads it (attention.h: Paged)."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in (
                "arena",
                "table",
                "start",
                "spans",
                "mask",
                "depth",
                "head_window",
                "head_sinks",
                "values",
                "value_table",
                "q_sinks",
            )
        ],
        *[
            (name, c_int64)
            for name in (
                "table_seq",
                "table_head",
                "table_layer",
                "page_mul",
                "page_add",
                "page_head",
                "page_layer",
                "start_seq",
                "start_head",
                "start_layer",
            )
        ],
        *[
            (name, c_int32)
            for name in ("n_spans", "window", "causal_new", "fixed", "ring", "share", "H", "G", "d")
        ],
        ("scale", c_float),
    ]


@dataclass(slots=True)
class PagedRows:
    """The rows held and the rows new in this step, for one layer."""

    arena: Tensor  # flat, elements of the cache's type
    table: Tensor  # int32, contiguous
    start: Tensor  # int32, rows held before this step
    spans: Tensor  # int32 [spans, 3]: sequence, first row, one past the last
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    table_seq: int
    start_seq: int
    table_head: int = 0
    table_layer: int = 0
    start_head: int = 0
    start_layer: int = 0
    page_mul: int = 1
    page_add: int = 0
    page_head: int = 0
    page_layer: int = 0
    table_offset: int = 0
    start_offset: int = 0
    window: int = 0  # keys a row may look back on, itself included; 0 = all
    mask: Tensor | None = None  # uint8, visibility among new rows: each span's [n, n] square in turn
    depth: Tensor | None = None  # int32 [N], with a mask: tokens of its own path that a new row ends
    causal_new: bool = True  # False: every new row sees all new rows (shared prefixes, scoring strips)
    share: bool = False  # texts whose tables begin alike attend to that part together
    head_window: Tensor | None = None  # int32, a head's own window from `head_offset` on; 0 = all
    head_sinks: Tensor | None = None  # with it: first keys that a row sees besides
    head_offset: int = 0
    values: Tensor | None = None  # flat: V lies there in pages of its own, and K's are half as large
    value_table: Tensor | None = None  # with it: their numbers, laid out as `table`
    q_sinks: Tensor | None = None  # float32 [N, H, d]: what asks the sinks instead of q, from other positions
    sinks_cos_sin: tuple[Tensor, Tensor] | None = None  # [N, d / 2] of those positions
    fixed: int = 0  # table entries that are used once; those behind them are used again
    ring: int = 0  # every `ring` pages (0: never), for texts without end

    def as_struct(self) -> Paged:
        # By position: this runs several times a layer, and keywords would double its cost.
        return Paged(
            self.arena.data_ptr(),
            self.table.data_ptr() + 4 * self.table_offset,
            self.start.data_ptr() + 4 * self.start_offset,
            self.spans.data_ptr(),
            None if self.mask is None else self.mask.data_ptr(),
            None if self.depth is None else self.depth.data_ptr(),
            None if self.head_window is None else self.head_window.data_ptr() + 4 * self.head_offset,
            None if self.head_sinks is None else self.head_sinks.data_ptr() + 4 * self.head_offset,
            None if self.values is None else self.values.data_ptr(),
            None if self.value_table is None else self.value_table.data_ptr() + 4 * self.table_offset,
            None if self.q_sinks is None else self.q_sinks.data_ptr(),
            self.table_seq,
            self.table_head,
            self.table_layer,
            self.page_mul,
            self.page_add,
            self.page_head,
            self.page_layer,
            self.start_seq,
            self.start_head,
            self.start_layer,
            self.spans.shape[0],
            self.window,
            self.causal_new,
            self.fixed,
            self.ring,
            self.share,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.scale,
        )

    def pages(self, sequence: int, head: int, count: int) -> Tensor:
        """Page numbers int64 [count] of one sequence's one head."""
        first = self.table_offset + sequence * self.table_seq + head * self.table_head
        entries = self.table.flatten()[first : first + count].long()
        return entries * self.page_mul + self.page_add + head * self.page_head

    def held(self, sequence: int, head: int) -> int:
        at = self.start_offset + sequence * self.start_seq + head * self.start_head
        return int(self.start.flatten()[at])


@dataclass(slots=True)
class Asked:
    """What the layers asked in a step, kept for a policy that weighs rows by it."""

    queries: Tensor  # float32 [L, N, H, d], before rotary embedding unless `rotated`
    lse: Tensor  # float32 [L, N, H], logsumexp of each query's scores
    rotated: bool = True
