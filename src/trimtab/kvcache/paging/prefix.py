"""Blocks that requests share: reference counts, and the index that finds a block by what it holds.

A block's key is a hash of its tokens chained to its parent's key; the chain starts at the policy's
fingerprint, so a block answers only for exactly these tokens after exactly that beginning under exactly
that policy. Blocks nobody uses stay cached until the memory is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from trimtab.kvcache.paging.arena import PagePool


class SharedBlocks:
    """Blocks of `block_tokens` tokens out of a pool, counted and findable."""

    def __init__(self, pool: PagePool, block_tokens: int, fingerprint: str) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self.root = hashlib.sha256(fingerprint.encode()).digest()
        self._users: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # blocks with a key and no user

    def key(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()

    def alloc(self, count: int) -> list[int] | None:
        """`count` blocks with one user each, or none at all; cached blocks make way, oldest first."""
        # Known in advance, so that nothing is forgotten for a request that fails all the same.
        if count > self.pool.available + len(self._cached):
            return None
        while self.pool.available < count:
            self._forget(next(iter(self._cached)))
        blocks = self.pool.alloc_many(count)
        assert blocks is not None
        for block in blocks:
            self._users[block] = 1
        return blocks

    def _forget(self, block: int) -> None:
        del self._cached[block]
        del self._block_of[self._key_of.pop(block)]
        self.pool.free([block])

    def find(self, tokens: Sequence[int], limit: int) -> tuple[list[int], list[bytes]]:
        """Blocks (each with one user more) and keys of the longest known beginning of `tokens`, at most
        `limit` blocks."""
        blocks: list[int] = []
        keys: list[bytes] = []
        parent, size = self.root, self.block_tokens
        for i in range(min(limit, len(tokens) // size)):
            parent = self.key(parent, tokens[i * size : (i + 1) * size])
            block = self._block_of.get(parent)
            if block is None:
                break
            self._cached.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1
            blocks.append(block)
            keys.append(parent)
        return blocks, keys

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable; the first block with a key keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One user less; what nobody uses is kept for reuse if it has a key, else freed."""
        # The end of a text is the least likely to be asked for again, so it becomes the oldest.
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self.pool.free([block])

    def drop_cached(self) -> None:
        while self._cached:
            self._forget(next(iter(self._cached)))

    @property
    def bytes_cached(self) -> int:
        return len(self._cached) * self.pool.page_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of blocks that somebody uses; a shared block counts once."""
        return len(self._users) * self.pool.page_bytes

    def check(self) -> None:
        assert all(count > 0 for count in self._users.values())
        assert not self._users.keys() & self._cached.keys(), "a block is used and cached"
        assert len(self._users) + len(self._cached) == self.pool.used, "free + used + cached is not the total"
        assert {b: k for k, b in self._block_of.items()} == self._key_of, "the index disagrees with itself"
        assert self._cached.keys() <= self._key_of.keys()
