"""Where packed and unpacked rows lie: the description that the C++ and the torch kernels of KIVI share.

See cpu/packed.h for the layout inside a block. A block spans all layers and heads; unit (layer, head) of
block b starts at byte (b * layers * heads + layer * heads + head) * unit_bytes of the arena.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from trimtab.kernels.paged import PAGE, PagedRows


class Packed(ctypes.Structure):
    """`PackedRows` as the C++ side reads it (packed.h: Packed)."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in ("arena", "k_full", "v_full", "k_packed", "v_packed", "k_done", "v_done")
        ],
        *[(name, c_int64) for name in ("table_seq", "full_unit", "k_unit", "v_unit")],
        *[(name, c_int32) for name in ("bits", "group", "layer", "n_units")],
    ]


@dataclass(slots=True)
class PackedRows:
    """Tables are int32 [slots, blocks]; `k_done`, `v_done` int32 [slots]; `rows` has what attention needs."""

    rows: PagedRows
    arena: Tensor  # bytes
    k_full: Tensor
    v_full: Tensor
    k_packed: Tensor
    v_packed: Tensor
    k_done: Tensor
    v_done: Tensor
    bits: int
    group: int
    num_layers: int
    layer: int = 0

    @property
    def n_units(self) -> int:
        return self.num_layers * self.rows.num_kv_heads

    @property
    def per_word(self) -> int:
        """Codes in a 32-bit word."""
        return 32 // self.bits

    @property
    def k_words(self) -> int:
        return -(-self.rows.head_dim // self.per_word)

    @property
    def v_words(self) -> int:
        return -(-PAGE // self.per_word)

    def full_unit(self, item_bytes: int) -> int:
        """Bytes of 16 tokens of K (or V) of one layer's one head, unpacked."""
        return PAGE * self.rows.head_dim * item_bytes

    @property
    def k_unit(self) -> int:
        """Bytes of `group` packed tokens of K of one layer's one head, scales and zeros included."""
        return self.group // PAGE * self.k_words * PAGE * 4 + 2 * self.rows.head_dim * 2

    @property
    def v_unit(self) -> int:
        """Bytes of 16 packed tokens of V of one layer's one head, scales and zeros included."""
        d = self.rows.head_dim
        return d // PAGE * self.v_words * PAGE * 4 + 2 * PAGE * (d // self.group) * 2

    def as_struct(self) -> Packed:
        return Packed(
            arena=self.arena.data_ptr(),
            k_full=self.k_full.data_ptr(),
            v_full=self.v_full.data_ptr(),
            k_packed=self.k_packed.data_ptr(),
            v_packed=self.v_packed.data_ptr(),
            k_done=self.k_done.data_ptr(),
            v_done=self.v_done.data_ptr(),
            table_seq=self.k_full.shape[1],
            full_unit=self.full_unit(self.rows.arena.element_size()),
            k_unit=self.k_unit,
            v_unit=self.v_unit,
            bits=self.bits,
            group=self.group,
            layer=self.layer,
            n_units=self.n_units,
        )
