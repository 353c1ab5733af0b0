"""Where rows lie of which the older part is coded: what the C++ and the torch kernels both read.

See cpu/coded.h for the layout of a coded unit. Every (slot, layer, head) has four tables of pages and its
own counts; page p of a table starts at byte p * (bytes of its page) of the arena, for values of theirs.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from trimtab.kernels.paged import PAGE, Paged, PagedRows

BITS = (2, 3, 4, 8)


class Coded(ctypes.Structure):
    """`CodedTables` as the C++ side reads it (coded.h: Coded)."""

    _fields_ = [
        ("rows", Paged),
        *[(name, c_void_p) for name in ("v_full", "k_coded", "v_coded", "k_done", "v_done", "v_arena")],
        *[(name, c_int64) for name in ("k_bytes", "v_bytes")],
        *[(name, c_int32) for name in ("bits", "group", "k_unit", "by_token")],
    ]


@dataclass(slots=True)
class CodedTables:
    """`rows.table` names the pages of K in full; the other tables are like it, counts like `rows.start`."""

    rows: PagedRows
    arena: Tensor  # bytes; `rows.arena` are the same as elements
    v_full: Tensor
    k_coded: Tensor
    v_coded: Tensor
    k_done: Tensor  # keys coded, values coded
    v_done: Tensor
    bits: int
    group: int  # numbers that share a scale and a zero
    by_token: bool  # groups of K are channels of one token and not tokens of one channel
    v_arena: Tensor | None = None  # bytes: where values lie, if not in `arena`; may be in another memory

    @property
    def values(self) -> Tensor:
        """The bytes in which values lie."""
        return self.arena if self.v_arena is None else self.v_arena

    @property
    def block_bytes(self) -> int:
        """Of 16 x 16 codes."""
        return 32 * self.bits

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return self.rows.head_dim // PAGE

    @property
    def k_unit(self) -> int:
        """Tokens of a coded unit of K: whole groups in whole blocks."""
        return PAGE if self.by_token else math.lcm(self.group, PAGE)

    @property
    def k_scales(self) -> int:
        """Scales of a coded unit of K."""
        d = self.rows.head_dim
        return d // self.group * PAGE if self.by_token else self.k_unit // self.group * d

    @property
    def v_scales(self) -> int:
        return self.rows.head_dim // self.group * PAGE

    @property
    def full_bytes(self) -> int:
        """Of 16 rows of K (or V) in full."""
        return PAGE * self.rows.head_dim * self.rows.arena.element_size()

    @property
    def k_bytes(self) -> int:
        """Of a coded unit of K, constants included."""
        return self.k_unit // PAGE * self.blocks * self.block_bytes + 4 * self.k_scales

    @property
    def v_bytes(self) -> int:
        """Of 16 coded rows of V, constants included."""
        return self.blocks * self.block_bytes + 4 * self.v_scales

    def as_struct(self) -> Coded:
        r = self.rows
        table, count = 4 * r.table_offset, 4 * r.start_offset
        return Coded(
            r.as_struct(),
            self.v_full.data_ptr() + table,
            self.k_coded.data_ptr() + table,
            self.v_coded.data_ptr() + table,
            self.k_done.data_ptr() + count,
            self.v_done.data_ptr() + count,
            self.values.data_ptr(),
            self.k_bytes,
            self.v_bytes,
            self.bits,
            self.group,
            self.k_unit,
            self.by_token,
        )
