"""Arena, page pools, shared blocks and per-head rows against plain Python models of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.shapes import make_shape
from trimtab.errors import ConfigError
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.kvcache.paging.prefix import SharedBlocks

CPU = torch.device("cpu")


class Pools(RuleBasedStateMachine):
    """Pools of several page sizes out of one arena; the model is which bytes each page covers."""

    @initialize(
        sizes=st.lists(st.sampled_from([32, 48, 64, 96, 160]), min_size=1, max_size=4),
        slabs=st.integers(1, 6),
    )
    def build(self, sizes: list[int], slabs: int) -> None:
        unit = math.lcm(*sizes)
        self.arena = Arena(unit * slabs + unit - 1, sizes, CPU)
        assert self.arena.total == unit * slabs
        self.pools = [PagePool(self.arena, size) for size in sizes]
        self.pages: list[list[int]] = [[] for _ in sizes]

    @rule(data=st.data(), count=st.integers(0, 9))
    def alloc(self, data: st.DataObject, count: int) -> None:
        i = data.draw(st.integers(0, len(self.pools) - 1))
        before = self.pools[i].used
        pages = self.pools[i].alloc_many(count)
        if pages is None:
            assert self.pools[i].used == before
            others = sum(len(p.slabs) for p in self.pools) - len(self.pools[i].slabs)
            room = (self.arena.n_slabs - others) * self.pools[i].per_slab - before
            assert room < count, "there was room"
        else:
            self.pages[i] += pages

    @precondition(lambda self: any(self.pages))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from([i for i, p in enumerate(self.pages) if p]))
        some = data.draw(st.lists(st.sampled_from(self.pages[i]), unique=True))
        self.pools[i].free(some)
        self.pages[i] = [p for p in self.pages[i] if p not in some]

    @invariant()
    def no_two_pages_overlap(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check()
        taken = torch.zeros(self.arena.total, dtype=torch.int32)
        for pool, pages in zip(self.pools, self.pages, strict=True):
            assert pool.used == len(pages) and pool.bytes_used == len(pages) * pool.page_bytes
            for page in pages:
                taken[page * pool.page_bytes : (page + 1) * pool.page_bytes] += 1
        assert int(taken.max()) <= 1
        assert int(taken.sum()) == sum(pool.bytes_used for pool in self.pools) <= self.arena.total
        if not any(self.pages):
            assert not any(pool.slabs for pool in self.pools), "empty slabs go back to all pools"


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class Prefixes(RuleBasedStateMachine):
    """Texts that take, publish and release blocks; the model is a dictionary from beginnings to blocks."""

    SIZE = 2  # tokens a block

    @initialize(blocks=st.integers(2, 8))
    def build(self, blocks: int) -> None:
        self.total = blocks
        self.pool = PagePool(Arena(64 * blocks, [64], CPU), 64)
        self.shared = SharedBlocks(self.pool, self.SIZE, "a policy")
        self.texts: list[tuple[list[int], list[int], int]] = []  # tokens, blocks, blocks published
        self.content: dict[int, tuple[int, ...]] = {}  # block: the beginning it stands for

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def start(self, tokens: list[int]) -> None:
        limit = (len(tokens) - 1) // self.SIZE
        found, keys = self.shared.find(tokens, limit)
        assert len(found) == len(keys) <= limit
        for i, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (i + 1) * self.SIZE]), "a block of another beginning"
        need = -(-len(tokens) // self.SIZE) - len(found)
        users = {b for _, blocks, _ in self.texts for b in blocks} | set(found)
        new = self.shared.alloc(need)
        if new is None:
            assert self.total - len(users) < need, "cached blocks should have made way"
            self.shared.release(found)
            return
        assert not set(new) & users
        for i, block in enumerate(new, len(found)):
            self.content[block] = tuple(tokens[: (i + 1) * self.SIZE])
        self.texts.append((tokens, found + new, len(found)))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.texts) - 1))
        tokens, blocks, _ = self.texts[i]
        parent = self.shared.root
        full = len(tokens) // self.SIZE
        for j in range(full):
            parent = self.shared.key(parent, tokens[j * self.SIZE : (j + 1) * self.SIZE])
            self.shared.publish(blocks[j], parent)
        self.texts[i] = (tokens, blocks, full)
        # Now everybody finds as much of it as there is.
        found, _ = self.shared.find(tokens, full)
        assert len(found) == full
        self.shared.release(found)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, blocks, _ = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.shared.release(blocks)

    @rule()
    def drop_cached(self) -> None:
        self.shared.drop_cached()
        assert self.shared.bytes_cached == 0

    @invariant()
    def the_counts_agree(self) -> None:
        if not hasattr(self, "shared"):
            return
        self.pool.arena.check()
        self.shared.check()
        users = Counter(block for _, blocks, _ in self.texts for block in blocks)
        assert self.shared._users == dict(users)
        assert self.shared.bytes_used == 64 * len(users)
        free = self.total - self.pool.used
        assert free + len(users) + self.shared.bytes_cached // 64 == self.total


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


class Heads(RuleBasedStateMachine):
    """Rows kept head by head; the model is a list of row numbers a head."""

    LAYERS, HEADS, DIM = 2, 2, 16

    @initialize(pages=st.integers(64, 200))
    def build(self, pages: int) -> None:
        self.shape = make_shape(layers=self.LAYERS, kv_heads=self.HEADS, head_dim=self.DIM, max_sequences=3)
        self.rows = PerHeadRows(self.shape, pages * 16 * self.shape.row_bytes)
        self.next = 0.0
        self.texts: dict[int, list[list[float]]] = {}  # slot: for each (layer, head) what its rows hold

    @precondition(lambda self: len(self.texts) < 3)
    @rule()
    def open(self) -> None:
        slot = min({0, 1, 2} - self.texts.keys())
        self.rows.open(slot)
        self.texts[slot] = [[] for _ in range(self.LAYERS * self.HEADS)]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        before = self.rows.pool.used
        if not self.rows.reserve(slot, count):
            assert self.rows.pool.used == before
            return
        for i, held in enumerate(self.texts[slot]):
            layer, head = divmod(i, self.HEADS)
            k = torch.zeros(count, self.HEADS, self.DIM)
            names = [self.next + j for j in range(count)]
            self.next += count
            k[:, head] = torch.tensor(names)[:, None]
            call = self.rows.call(layer, torch.tensor([[slot, 0, count]], dtype=torch.int32))
            # Each head is written by its own call; rows of the other head are overwritten by theirs.
            keep_k, keep_v = self.read(slot) if head else (None, None)
            self.shape.kernels.write(call, k, -k)
            if keep_k is not None:
                self.restore(slot, layer, head - 1, count, keep_k, keep_v)
            held += names
        self.rows.grow(slot, count)

    def read(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        longest = int(self.rows._pages[slot].min()) * 16
        index = torch.arange(longest).expand(self.LAYERS, self.HEADS, longest)
        return self.rows.gather(slot, index)

    def restore(self, slot: int, layer: int, head: int, count: int, k: Any, v: Any) -> None:
        start = int(self.rows.length[slot, layer, head])
        index = torch.arange(start, start + count).expand(self.LAYERS, self.HEADS, count)
        now_k, now_v = self.rows.gather(slot, index)
        now_k[layer, head], now_v[layer, head] = k[layer, head, index[0, 0]], v[layer, head, index[0, 0]]
        self.rows.scatter(slot, index, now_k, now_v)

    @precondition(lambda self: any(held[0] for held in self.texts.values()))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([s for s, held in self.texts.items() if held[0]]))
        held = self.texts[slot]
        n = data.draw(st.integers(1, len(held[0])))
        index = [data.draw(st.permutations(range(len(h))))[:n] for h in held]
        copied = self.rows.keep(slot, torch.tensor(index).view(self.LAYERS, self.HEADS, n))
        assert copied == 2 * len(held) * n * self.DIM * 4
        self.texts[slot] = [[h[j] for j in order] for h, order in zip(held, index, strict=True)]

    @precondition(lambda self: any(held[0] for held in self.texts.values()))
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([s for s, held in self.texts.items() if held[0]]))
        held = self.texts[slot]
        victim = [data.draw(st.integers(0, len(h) - 1)) for h in held]
        self.rows.replace(slot, torch.tensor(victim).view(self.LAYERS, self.HEADS))
        for h, v in zip(held, victim, strict=True):
            h[v] = h[-1]
            h.pop()

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        self.rows.close(slot)
        del self.texts[slot]
        assert self.rows.held(slot) == 0

    @invariant()
    def rows_are_where_the_model_says(self) -> None:
        if not hasattr(self, "rows"):
            return
        self.rows.check()
        for slot, held in self.texts.items():
            n = len(held[0])
            assert (self.rows.length[slot] == n).all()
            assert self.rows.read(slot) == len(held) * n * self.shape.row_bytes
            assert self.rows.held(slot) >= len(held) * -(-n // 16) * 16 * self.shape.row_bytes
            if n:
                k, v = self.rows.gather(slot, torch.arange(n).expand(self.LAYERS, self.HEADS, n))
                expected = torch.tensor(held).view(self.LAYERS, self.HEADS, n)
                assert torch.equal(k[..., 0], expected) and torch.equal(v[..., -1], -expected)


TestHeads = Heads.TestCase
TestHeads.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_pages_that_are_no_longer_needed_go_back_at_once() -> None:
    shape = make_shape(layers=1, kv_heads=2, head_dim=16)
    rows = PerHeadRows(shape, 1 << 20)
    rows.open(0)
    assert rows.reserve(0, 100)
    rows.grow(0, 100)
    assert rows.pool.used == 2 * 7
    rows.keep(0, torch.arange(33).expand(1, 2, 33))
    assert rows.pool.used == 2 * 3
    rows.replace(0, torch.zeros(1, 2, dtype=torch.int64))
    assert rows.pool.used == 2 * 3, "the page of the row to come stays"
    rows.cut(0, 1)
    assert rows.pool.used == 2 * 2


def test_an_arena_smaller_than_a_page_says_how_much_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"kv_memory is 100 B.*at least 192 B"):
        Arena(100, [64, 96], CPU)


def test_a_prefix_answers_only_for_its_policy_and_its_whole_beginning() -> None:
    pool = PagePool(Arena(640, [64], CPU), 64)
    mine, other = SharedBlocks(pool, 2, "full"), SharedBlocks(pool, 2, "something else")
    assert mine.root != other.root
    first = mine.key(mine.root, [1, 2])
    assert mine.key(first, [3, 4]) != mine.key(mine.key(mine.root, [2, 1]), [3, 4])
    assert mine.key(mine.root, [1, 2]) == first != other.key(other.root, [1, 2])


def test_a_request_that_cannot_be_met_costs_no_cached_blocks() -> None:
    pool = PagePool(Arena(64 * 4, [64], CPU), 64)
    shared = SharedBlocks(pool, 2, "full")
    [used] = shared.alloc(1) or []
    cached = shared.alloc(2) or []
    parent = shared.root
    for i, block in enumerate(cached):
        parent = shared.key(parent, [i, i])
        shared.publish(block, parent)
    shared.release(cached)
    assert shared.alloc(4) is None
    assert shared.bytes_cached == 2 * 64, "blocks were forgotten for nothing"
    assert shared.find([0, 0, 1, 1], 2)[0] == cached
    assert used not in cached
