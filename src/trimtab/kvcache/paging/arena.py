"""One bounded piece of memory, cut into slabs, that pools of equal pages take and give back.

Every byte a policy holds comes from here, so `kv_memory` is a bound by construction and "bytes held" is a
count of pages handed out, not an estimate. Page number n of a pool starts at byte n * page_bytes of the
arena, whichever slab it lies in, because a slab is a multiple of every page size in use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.models.memory import large_pages
from trimtab.sizes import format_bytes


class Arena:
    """`total_bytes` of memory (rounded down to slabs), untouched until a page is used.

    `setting`: what the bound is called in messages. `pinned`: memory that a GPU can copy from by itself.
    """

    def __init__(
        self,
        total_bytes: int,
        page_sizes: list[int],
        device: torch.device,
        min_slab: int = 1,
        setting: str = "kv_memory",
        pinned: bool = False,
    ) -> None:
        unit = math.lcm(*page_sizes)
        self.slab_bytes = unit * max(1, min_slab // unit)
        self.n_slabs = total_bytes // self.slab_bytes
        self.setting = setting
        if self.n_slabs < 1:
            raise ConfigError(
                f"{setting} is {format_bytes(total_bytes)}, less than one page of this cache; "
                f"give at least {format_bytes(self.slab_bytes)}"
            )
        size = self.n_slabs * self.slab_bytes
        if device.type == "cpu" and not pinned:
            self.bytes = large_pages(size)
        else:
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._free = list(range(self.n_slabs - 1, -1, -1))
        self.pools: list[PagePool] = []

    @property
    def total(self) -> int:
        return self.n_slabs * self.slab_bytes

    @property
    def free_slabs(self) -> int:
        return len(self._free)

    def take_slab(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_slab(self, slab: int) -> None:
        self._free.append(slab)

    def check(self) -> None:
        """free + owned by pools = all slabs, and every pool's pages add up."""
        owned = [slab for pool in self.pools for slab in pool.slabs]
        assert sorted(owned + self._free) == list(range(self.n_slabs)), "slabs lost or owned twice"
        for pool in self.pools:
            pool.check()


class PagePool:
    """Equal pages out of an arena. A page is named by its number; the arena owns the memory."""

    def __init__(self, arena: Arena, page_bytes: int) -> None:
        assert arena.slab_bytes % page_bytes == 0
        self.arena = arena
        self.page_bytes = page_bytes
        self.per_slab = arena.slab_bytes // page_bytes
        self.slabs: dict[int, list[int]] = {}  # slab -> its free pages
        self._open: dict[int, None] = {}  # slabs with a free page, oldest first
        self.used = 0
        arena.pools.append(self)

    def view(self, dtype: torch.dtype) -> Tensor:
        """The whole arena as a flat tensor of `dtype`; page n starts at element n * page_bytes / itemsize."""
        return self.arena.bytes.view(dtype)

    @property
    def available(self) -> int:
        """Pages that `alloc` could still give."""
        return (len(self.slabs) + self.arena.free_slabs) * self.per_slab - self.used

    def alloc(self) -> int | None:
        """A page, or None when the arena is full."""
        if not self._open:
            slab = self.arena.take_slab()
            if slab is None:
                return None
            first = slab * self.per_slab
            self.slabs[slab] = list(range(first + self.per_slab - 1, first - 1, -1))
            self._open[slab] = None
        slab = next(iter(self._open))
        pages = self.slabs[slab]
        page = pages.pop()
        if not pages:
            del self._open[slab]
        self.used += 1
        return page

    def alloc_many(self, count: int) -> list[int] | None:
        """`count` pages or none at all."""
        pages: list[int] = []
        for _ in range(count):
            page = self.alloc()
            if page is None:
                self.free(pages)
                return None
            pages.append(page)
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages:
            slab = page // self.per_slab
            free = self.slabs[slab]
            free.append(page)
            self._open[slab] = None
            if len(free) == self.per_slab:
                del self.slabs[slab]
                del self._open[slab]
                self.arena.give_slab(slab)
        self.used -= len(pages)

    @property
    def bytes_used(self) -> int:
        return self.used * self.page_bytes

    def check(self) -> None:
        free = [page for pages in self.slabs.values() for page in pages]
        assert len(set(free)) == len(free), "a page is free twice"
        assert len(free) + self.used == len(self.slabs) * self.per_slab, (
            len(free),
            self.used,
            len(self.slabs),
        )
