"""Where the rows of a cache lie that codes K and V of all heads of a layer together.

What RotateKV and KVQuant stand on; cpu/per_layer.h has the C++ side, reference_per_layer.py the torch side.
`width` is G * d channels, all KV heads of a layer side by side. A block is 16 tokens of all layers:

  full    the model's type, a layer's unit being K [width, 16] and then V [G, 16, d]
  coded   bytes, a layer's unit being the codec's K unit (`k_unit` bytes) and then its V unit (`v_unit`)
  kept    one token of one layer, the model's type: K [width] and then V [width]

Rows below `done` of a sequence are read from `coded`, except those named in `kept_at`; the rest from `full`.
Keys are stored before rotary embedding where `cos` and `sin` are given, and turned when they are read.

A codec sees rows in its own channels: of a key, first a Hadamard transform of `hadamard` channels at a time,
then `order` (stored channel c is transformed channel order[layer, c]). With `folded` the keys arrive like
that from the model, and lie like that in `full` and `kept`. Values lie as they arrive.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trimtab.kernels.paged import PAGE


class PerLayer(ctypes.Structure):
    """`PerLayerTables` as the C++ side reads it (per_layer.h: PerLayer)."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in (
                *("arena", "full", "coded", "kept_at", "kept_page", "kept_count", "start", "done"),
                *("spans", "mask", "cos", "sin", "new_cos", "new_sin", "order", "codec"),
            )
        ],
        *[(name, c_int64) for name in ("table_seq", "k_unit", "v_unit")],
        *[
            (name, c_int32)
            for name in (
                *("kind", "bits", "n_layers", "layer", "n_spans", "H", "G", "d"),
                *("kept_max", "hadamard", "folded"),
            )
        ],
        ("scale", c_float),
    ]


class Codec(Protocol):
    """Codes of 16 tokens' K or V of one layer; see codes.h for a 16 x 16 block of codes.

    One class a codec, with its torch side; the C++ side is a struct of the same meaning, chosen by `kind`
    and `bits` in per_layer_api.h.
    """

    @property
    def kind(self) -> int:
        """Which C++ codec: 1 = affine.h; a new one takes the next number."""
        ...

    @property
    def bits(self) -> int: ...

    @property
    def k_unit(self) -> int:
        """Bytes of 16 tokens' K of one layer, constants included; a multiple of 32."""
        ...

    @property
    def v_unit(self) -> int: ...

    def as_struct(self) -> ctypes.Structure:
        """What the C++ codec reads besides `PerLayer` (group sizes, addresses of tables)."""
        ...

    def encode(
        self, layer: int, k_units: Tensor, v_units: Tensor, at: int, k: Tensor, v: Tensor, skip: Tensor
    ) -> None:
        """Code rows k, v float32 [n, width] into units uint8 [u, k_unit] and [u, v_unit], in place.

        The first row is token `at` (0 to 15) of the first unit; places not coded yet are zero bytes. Rows
        where `skip` (bool [n]) is set are kept in full elsewhere and need no codes.
        """
        ...

    def decode_keys(self, layer: int, units: Tensor) -> Tensor:
        """float32 [u, 16, width] of units uint8 [u, k_unit]; anything in places that were not coded."""
        ...

    def decode_values(self, layer: int, units: Tensor) -> Tensor:
        """float32 [u, 16, width] of units uint8 [u, v_unit]."""
        ...


@dataclass(slots=True)
class PerLayerTables:
    """The rows held and the rows new in this step. Tables and counts are int32 on the CPU."""

    arena: Tensor  # bytes
    full: Tensor  # [slots, blocks]
    coded: Tensor  # [slots, blocks]
    kept_at: Tensor  # [slots, layers, most]: token numbers, ascending
    kept_page: Tensor  # [slots, layers, most]: pages of one row
    kept_count: Tensor  # [slots, layers]
    start: Tensor  # [slots], rows held before this step
    done: Tensor  # [slots], rows coded
    spans: Tensor  # [spans, 3]: sequence, first row, one past the last
    rows_like: Tensor  # an empty tensor of the rows' type
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    codec: Codec | None  # None: nothing is ever coded
    cos: Tensor | None = None  # float32 [blocks, d / 2, 16], of the token numbers
    sin: Tensor | None = None
    order: Tensor | None = None  # int32 [layers, width]
    hadamard: int = 1
    folded: bool = False
    layer: int = 0
    mask: Tensor | None = None  # uint8, visibility among new rows: each span's [n, n] square in turn
    new_cos: Tensor | None = None  # float32 [N, d / 2], with a mask: of the new rows' positions in a tree
    new_sin: Tensor | None = None

    @property
    def width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def row_bytes(self) -> int:
        """K and V of one token in one layer, in full: a page of `kept`."""
        return 2 * self.width * self.rows_like.element_size()

    @property
    def full_block(self) -> int:
        """Bytes of 16 tokens in all layers, in full."""
        return PAGE * self.num_layers * self.row_bytes

    @property
    def coded_block(self) -> int:
        """Bytes of 16 tokens in all layers, coded."""
        return 0 if self.codec is None else self.num_layers * (self.codec.k_unit + self.codec.v_unit)

    def as_struct(self) -> tuple[PerLayer, object]:
        """The C++ view, and what must stay alive while it is used."""
        codec = self.codec
        extra = None if codec is None else codec.as_struct()
        return PerLayer(
            self.arena.data_ptr(),
            self.full.data_ptr(),
            self.coded.data_ptr(),
            self.kept_at.data_ptr(),
            self.kept_page.data_ptr(),
            self.kept_count.data_ptr(),
            self.start.data_ptr(),
            self.done.data_ptr(),
            self.spans.data_ptr(),
            None if self.mask is None else self.mask.data_ptr(),
            None if self.cos is None else self.cos.data_ptr(),
            None if self.sin is None else self.sin.data_ptr(),
            None if self.new_cos is None else self.new_cos.data_ptr(),
            None if self.new_sin is None else self.new_sin.data_ptr(),
            None if self.order is None else self.order.data_ptr(),
            None if extra is None else ctypes.addressof(extra),
            self.full.shape[1],
            0 if codec is None else codec.k_unit,
            0 if codec is None else codec.v_unit,
            0 if codec is None else codec.kind,
            0 if codec is None else codec.bits,
            self.num_layers,
            self.layer,
            self.spans.shape[0],
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.kept_at.shape[2],
            self.hadamard,
            self.folded,
            self.scale,
        ), extra
