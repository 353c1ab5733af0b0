"""RotateKV's codec: codes between a token's smallest and largest value in a group of channels, K and V alike.

cpu/affine.h is the same in C++ and says how a unit is laid out.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.codes import block_bytes, pack_codes, unpack_codes
from trimtab.kernels.paged import PAGE


class _Settings(ctypes.Structure):
    _fields_ = [("group", c_int32), ("clip", c_float)]


@dataclass(frozen=True, slots=True)
class AffineCodec:
    """`group` channels of a token share a scale and a zero; both ends are multiplied by `clip`."""

    bits: int
    width: int  # channels of a row
    group: int
    clip: float = 1.0
    kind: int = 1

    @property
    def _codes(self) -> int:
        return self.width // PAGE * block_bytes(self.bits)

    @property
    def k_unit(self) -> int:
        return self._codes + 2 * PAGE * (self.width // self.group) * 2

    @property
    def v_unit(self) -> int:
        return self.k_unit

    def as_struct(self) -> ctypes.Structure:
        return _Settings(self.group, self.clip)

    def encode(
        self, layer: int, k_units: Tensor, v_units: Tensor, at: int, k: Tensor, v: Tensor, skip: Tensor
    ) -> None:
        groups, n = self.width // self.group, len(k)
        for units, rows, keys in ((k_units, k, True), (v_units, v, False)):
            codes, scale, zero = self._quantize(rows)
            codes[skip], scale[skip], zero[skip] = 0, 0, 0
            tokens = codes.new_zeros(len(units) * PAGE, self.width)
            tokens[at : at + n] = codes
            blocks = tokens.view(-1, PAGE, self.width // PAGE, PAGE).transpose(
                1, 2
            )  # [u, blocks, tokens, 16]
            if keys:
                blocks = blocks.transpose(2, 3)
            units[:, : self._codes] |= pack_codes(blocks, self.bits).flatten(1)
            constants = units[:, self._codes :].view(torch.float16)
            for half, value in enumerate((scale, zero)):
                mine = constants[:, half * PAGE * groups : (half + 1) * PAGE * groups]
                held = mine.view(-1, groups, PAGE).transpose(1, 2) if keys else mine.view(-1, PAGE, groups)
                held = held.reshape(-1, groups).clone()
                held[at : at + n] = value
                held = held.view(-1, PAGE, groups)
                mine.copy_((held.transpose(1, 2) if keys else held).flatten(1))

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int64 [n, width], scales and zeros float16 [n, groups]."""
        x = rows.unflatten(-1, (-1, self.group))
        low, high = x.amin(-1) * self.clip, x.amax(-1) * self.clip
        top = 2**self.bits - 1
        scale = ((high - low) / top).half()
        s = scale.float()
        zero = torch.where(s > 0, (low / s).round() * s, low).half()
        codes = ((x - zero.float()[..., None]) / s[..., None]).round().clamp(0, top)
        codes = torch.where(s[..., None] > 0, codes, 0)
        return codes.long().flatten(1), scale, zero

    def decode_keys(self, layer: int, units: Tensor) -> Tensor:
        codes = self._blocks(units).transpose(2, 3)
        constants = units[:, self._codes :].view(torch.float16).float().view(len(units), 2, -1, PAGE)
        return self._values(codes, constants.transpose(2, 3))

    def decode_values(self, layer: int, units: Tensor) -> Tensor:
        constants = units[:, self._codes :].view(torch.float16).float().view(len(units), 2, PAGE, -1)
        return self._values(self._blocks(units), constants)

    def _blocks(self, units: Tensor) -> Tensor:
        """Codes [u, blocks, position, lane]."""
        blocks = units[:, : self._codes].reshape(len(units), self.width // PAGE, block_bytes(self.bits))
        return unpack_codes(blocks, self.bits)

    def _values(self, codes: Tensor, constants: Tensor) -> Tensor:
        """[u, 16, width] of codes [u, blocks, token, channel] and constants [u, 2, 16, groups]."""
        scale, zero = constants.repeat_interleave(self.group, -1).unbind(1)
        return codes.transpose(1, 2).flatten(2).float() * scale + zero
