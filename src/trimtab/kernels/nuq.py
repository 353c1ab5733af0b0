"""KVQuant's codec: codes are places in a codebook of a layer, and what lies far out is kept as it is.

cpu/nuq.h is the same in C++ and says how a unit is laid out.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.kernels.codes import block_bytes, pack_codes, unpack_codes
from trimtab.kernels.paged import PAGE

_MOST_A_TOKEN = 255  # outlying keys of one token, a byte in the unit


class _Settings(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("k_range", "k_edges", "k_book", "v_edges", "v_book")],
        *[(name, c_int32) for name in ("k_most", "v_side")],
    ]


def normalized(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` so that `low` to `high` becomes -1 to 1; 0 where these are the same."""
    half = (high - low) / 2
    return torch.where(half > 0, (x - (high + low) / 2) / half, torch.zeros_like(x))


def outliers_per_side(outliers: float, width: int) -> int:
    """How many of `width` numbers lie beyond one percentile, when a share of `outliers` lies beyond both."""
    return 0 if outliers == 0 else width - 1 - int((width - 1) * (1 - outliers / 2))


def edges(book: Tensor) -> Tensor:
    """Where one centroid of `book` [..., n], ascending, ends and the next begins: [..., n - 1]."""
    return (book[..., 1:] + book[..., :-1]) / 2


@dataclass(frozen=True, slots=True, eq=False)
class NuqCodec:
    """Tables of all layers, float32 on the CPU; see `tables`, which makes them.

    `k_most`: outlying keys kept exactly for the 16 tokens of a unit. `v_side`: the largest and the smallest
    values of a token that are kept exactly, so many of each.
    """

    bits: int
    width: int  # channels of a row
    dtype: torch.dtype  # of the numbers kept exactly
    k_range: Tensor  # [L, 4, width]: low, high, middle, half
    k_edges: Tensor  # [L, 16], infinite beyond the last
    k_book: Tensor  # [L, 16]
    v_edges: Tensor
    v_book: Tensor
    k_most: int
    v_side: int
    kind: int = 2

    @classmethod
    def make(
        cls,
        dtype: torch.dtype,
        k_range: Tensor,
        k_books: tuple[Tensor, Tensor],
        v_books: tuple[Tensor, Tensor],
        k_share: float,
        v_side: int,
    ) -> NuqCodec:
        """From `k_range` [L, 2, width] (low, high) and, for K and V each, the codebooks [L, 2^bits] to code
        with and to decode with; for a share of `k_share` of the keys there is room in the list, or more."""
        bits, width = k_books[0].shape[1].bit_length() - 1, k_range.shape[2]
        low, high = k_range.float().unbind(1)
        made = cls(
            bits,
            width,
            dtype,
            k_range=torch.stack([low, high, (high + low) / 2, (high - low) / 2], 1).contiguous(),
            k_edges=_sixteen(edges(k_books[0]), math.inf),
            k_book=_sixteen(k_books[1], 0.0),
            v_edges=_sixteen(edges(v_books[0]), math.inf),
            v_book=_sixteen(v_books[1], 0.0),
            k_most=math.ceil(PAGE * width * k_share),
            v_side=v_side,
        )
        if not k_share:
            return made
        spare = made.k_unit - made._k_used  # room that would be wasted
        return replace(made, k_most=made.k_most + spare // made._entry)

    @property
    def _codes(self) -> int:
        return self.width // PAGE * block_bytes(self.bits)

    @property
    def _entry(self) -> int:
        """Bytes of a number in a list, and of its channel."""
        return self.dtype.itemsize + 2

    @property
    def _k_used(self) -> int:
        return self._codes + 2 * PAGE + self.k_most * self._entry

    @property
    def k_unit(self) -> int:
        """Such that K and V together are a few 64ths of the same rows in full: blocks of both kinds come out
        of one arena, whose parts are as large as their least common multiple."""
        return _padded(self._k_used + self.v_unit, self.width * self.dtype.itemsize // 2) - self.v_unit

    @property
    def v_unit(self) -> int:
        return _padded(self._codes + 4 * PAGE + PAGE * 2 * self.v_side * self._entry)

    def as_struct(self) -> ctypes.Structure:
        tables = (self.k_range, self.k_edges, self.k_book, self.v_edges, self.v_book)
        return _Settings(*(table.data_ptr() for table in tables), self.k_most, self.v_side)

    def listed(self, k_units: Tensor) -> tuple[int, int]:
        """How many keys of units uint8 [u, k_unit] lie beyond their range: kept exactly, and clamped."""
        counts = k_units[:, self._codes : self._codes + 2 * PAGE].view(-1, 2, PAGE).sum((0, 2))
        return int(counts[0]), int(counts[1])

    # --- the torch side

    def encode(
        self, layer: int, k_units: Tensor, v_units: Tensor, at: int, k: Tensor, v: Tensor, skip: Tensor
    ) -> None:
        keep = ~skip[:, None]
        low, high, middle, half = self.k_range[layer].to(k.device)
        out = ((k < low) | (k > high)) & keep if self.k_most else torch.zeros_like(k, dtype=torch.bool)
        exact = self._list_keys(k_units, at, k, out)
        z = torch.where(half > 0, (k - middle) / half, torch.zeros_like(k))
        codes = self._code(z, self.k_edges[layer]) * (keep & ~exact)
        self._put(k_units, at, codes, keys=True)

        order = v.argsort(stable=True, dim=-1)
        far = torch.cat([order[:, : self.v_side], order[:, self.width - self.v_side :]], 1)
        inner = v.gather(1, order[:, self.v_side : self.width - self.v_side])
        middle = ((inner[:, -1] + inner[:, 0]) / 2).half()
        half = ((inner[:, -1] - inner[:, 0]) / 2).half()
        z = (v - middle.float()[:, None]) / half.float()[:, None]
        z = torch.where(half[:, None] > 0, z, torch.zeros_like(z))
        dense = torch.ones_like(keep).expand(v.shape).scatter(1, far, torch.zeros_like(far, dtype=torch.bool))
        self._put(v_units, at, self._code(z, self.v_edges[layer]) * (keep & dense), keys=False)
        rows = slice(at, at + len(v))
        for held, new in zip(self._value_parts(v_units), (middle, half, v.gather(1, far), far), strict=True):
            flat = held.flatten(0, 1).clone()
            flat[rows] = torch.where(keep if new.dim() > 1 else keep[:, 0], new, 0).to(flat.dtype)
            held.copy_(flat.view(held.shape))

    def decode_keys(self, layer: int, units: Tensor) -> Tensor:
        _, _, middle, half = self.k_range[layer].to(units.device)
        codes = self._blocks(units).transpose(2, 3).transpose(1, 2).flatten(2)
        k = self.k_book[layer].to(units.device)[codes] * half + middle
        for unit, rows in zip(units, k, strict=True):
            listed, _, values, channels = self._key_parts(unit)
            tokens = torch.arange(PAGE, device=k.device).repeat_interleave(listed.long())
            rows[tokens, channels[: len(tokens)].long()] = values[: len(tokens)].float()
        return k

    def decode_values(self, layer: int, units: Tensor) -> Tensor:
        middle, half, values, channels = self._value_parts(units)
        codes = self._blocks(units).transpose(1, 2).flatten(2)
        v = self.v_book[layer].to(units.device)[codes] * half.float()[..., None] + middle.float()[..., None]
        return v.scatter(2, channels.long(), values.float())

    def _code(self, z: Tensor, table: Tensor) -> Tensor:
        """How many edges of `table` [16] each normalized value exceeds."""
        return torch.bucketize(z, table[: 2**self.bits - 1].to(z.device))

    def _put(self, units: Tensor, at: int, codes: Tensor, keys: bool) -> None:
        tokens = codes.new_zeros(len(units) * PAGE, self.width)
        tokens[at : at + len(codes)] = codes
        blocks = tokens.view(-1, PAGE, self.width // PAGE, PAGE).transpose(1, 2)  # [u, blocks, tokens, 16]
        if keys:
            blocks = blocks.transpose(2, 3)
        units[:, : self._codes] |= pack_codes(blocks, self.bits).flatten(1)

    def _blocks(self, units: Tensor) -> Tensor:
        """Codes [u, blocks, position, lane]."""
        blocks = units[:, : self._codes].reshape(len(units), self.width // PAGE, block_bytes(self.bits))
        return unpack_codes(blocks, self.bits)

    def _list_keys(self, units: Tensor, at: int, k: Tensor, out: Tensor) -> Tensor:
        """Keep the keys at `out` [n, width] exactly, as long as there is room; where that was."""
        exact = torch.zeros_like(out)
        for number, unit in enumerate(units):
            listed, clamped, values, channels = self._key_parts(unit)
            for t in range(max(0, at - number * PAGE), min(PAGE, at + len(k) - number * PAGE)):
                row = number * PAGE + t - at
                found, used = out[row].nonzero()[:, 0], int(listed[:t].sum())
                count = min(len(found), self.k_most - used, _MOST_A_TOKEN)
                kept = found[:count]
                values[used : used + count] = k[row, kept].to(self.dtype)
                channels[used : used + count] = kept.to(torch.int16)
                listed[t], clamped[t] = count, min(len(found) - count, 255)
                exact[row, kept] = True
        return exact

    def _key_parts(self, unit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of one K unit: listed [16], clamped [16], values [k_most], channels [k_most]."""
        parts = [PAGE, PAGE, self.k_most * self.dtype.itemsize, self.k_most * 2]
        listed, clamped, values, channels = unit[self._codes : self._codes + sum(parts)].split(parts)
        return listed, clamped, values.view(self.dtype), channels.view(torch.int16)

    def _value_parts(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of V units: middle [u, 16], half [u, 16], values and channels [u, 16, 2 * v_side]."""
        parts = [2 * PAGE, 2 * PAGE, PAGE * 2 * self.v_side * self.dtype.itemsize, PAGE * 2 * self.v_side * 2]
        middle, half, values, channels = units[:, self._codes : self._codes + sum(parts)].split(parts, 1)
        values = values.view(self.dtype).view(len(units), PAGE, 2 * self.v_side)
        channels = channels.view(torch.int16).view(len(units), PAGE, 2 * self.v_side)
        return middle.view(torch.float16), half.view(torch.float16), values, channels


def _padded(size: int, step: int = 32) -> int:
    """The least multiple of `step`, rounded up to whole 32 bytes, that holds `size`."""
    step = -(-step // 32) * 32
    return -(-size // step) * step


def _sixteen(table: Tensor, fill: float) -> Tensor:
    """`table` [L, n] as float32, with `fill` up to sixteen columns."""
    return torch.nn.functional.pad(table.float(), (0, 16 - table.shape[1]), value=fill).contiguous()
