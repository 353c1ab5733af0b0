"""Blocks of 16 x 16 codes of a few bits in plain torch; the layout is that of cpu/codes.h."""

from __future__ import annotations

import torch
from torch import Tensor


def block_bytes(bits: int) -> int:
    """Bytes of a block of 16 positions in 16 lanes."""
    return 32 * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32 * bits] of codes int64 [..., 16 positions, 16 lanes]."""
    if bits == 3:
        return torch.cat([pack_codes(codes & 3, 2), _words(codes >> 2, 1, 16)], -1)
    return _words(codes, bits, 32)


def unpack_codes(blocks: Tensor, bits: int) -> Tensor:
    """int64 [..., 16 positions, 16 lanes] of uint8 [..., 32 * bits]."""
    if bits == 3:
        return unpack_codes(blocks[..., :64], 2) | _codes(blocks[..., 64:], 1, 16) << 2
    return _codes(blocks, bits, 32)


def _words(codes: Tensor, bits: int, word: int) -> Tensor:
    """Little-endian words of `word` bits: `word // bits` positions of a lane in each."""
    each = word // bits
    shifts = torch.arange(each, device=codes.device)[:, None] * bits
    words = (codes.unflatten(-2, (-1, each)) << shifts).sum(-2)  # [..., rows, lanes]
    parts = torch.arange(0, word, 8, device=codes.device)
    return (words[..., None] >> parts & 255).to(torch.uint8).flatten(-3)


def _codes(blocks: Tensor, bits: int, word: int) -> Tensor:
    each = word // bits
    parts = torch.arange(0, word, 8, device=blocks.device)
    words = (blocks.long().unflatten(-1, (-1, 16, word // 8)) << parts).sum(-1)  # [..., rows, lanes]
    shifts = torch.arange(each, device=blocks.device)[:, None] * bits
    return (words[..., None, :] >> shifts & (1 << bits) - 1).flatten(-3, -2)
