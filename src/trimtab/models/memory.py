"""Memory for converted weights and for caches, in large pages where the system gives them.

A decode step reads every weight and every cached row once. With pages of 4 KiB a few ten megabytes are
already more than a processor's table of translations holds, and every page then costs a walk; on the machines
measured that was 14 to 37 percent of a step in float32, and about 20 percent with 24 MiB of cache.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_LARGE_PAGE = 2 << 20
_LINE = 64


def large_pages(total: int) -> torch.Tensor:
    """`total` bytes on the CPU, none of them touched."""
    if total < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(total, dtype=torch.uint8)
    size = -(-total // _LARGE_PAGE) * _LARGE_PAGE + _LARGE_PAGE
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % _LARGE_PAGE
    return torch.frombuffer(area, dtype=torch.uint8)[skip : skip + total]


class WeightMemory:
    """Room for tensors of `sizes` bytes, one after another, each on a cache line of its own."""

    def __init__(self, sizes: list[int]) -> None:
        total = sum(-(-size // _LINE) * _LINE for size in sizes)
        self._free = large_pages(total)

    def hold(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of `tensor` in `dtype`, in the next room."""
        size = tensor.numel() * dtype.itemsize
        room, self._free = self._free[:size], self._free[-(-size // _LINE) * _LINE :]
        return room.view(dtype).view(tensor.shape).copy_(tensor)
