"""KIVI: keys quantized per channel, values per token, the latest tokens kept in full.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750.

Keys have channels of outlying size, so a group that shares scale and zero is `group_size` tokens of one
channel; values have not, so a group is `group_size` channels of one token. The prompt is attended in full
precision and packed when it is complete. From then on full keys are packed `residual` at a time (their
number breathes between 0 and residual - 1); of the values always the last `residual` are in full.

Exact as published (asymmetric min-max, keys after rotary embedding), with grouped-query attention added.
Group size 32 and residual 128 are the usual settings (reconstructed: the release leaves them to the caller).
Stored rows are never quantized twice. A chunk that was packed cannot be rolled back, so only committed rows
are packed. Attention unpacks tile by tile; `bits=16` packs nothing and equals `full`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.packed import PackedRows
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class KiviOptions:
    bits: Literal[2, 4, 8, 16] = field(
        default=2, metadata={"help": "bits a number; 16 = keep all in full", "label": True}
    )
    group_size: int = field(default=32, metadata={"help": "numbers that share a scale and a zero"})
    residual: int = field(default=128, metadata={"help": "latest tokens kept in full"})

    def __post_init__(self) -> None:
        if self.group_size < PAGE or self.group_size % PAGE:
            raise ConfigError(
                f"option 'group_size' of kivi is {self.group_size}; it must be a multiple of {PAGE}"
            )
        if self.residual < self.group_size or self.residual % self.group_size:
            raise ConfigError(
                f"option 'residual' of kivi is {self.residual}; it must be a multiple of group_size "
                f"({self.group_size})"
            )


@dataclass(eq=False)
class Blocks:
    """A run of blocks in one table: entries [first, first + len(blocks))."""

    pool: PagePool
    table: Tensor
    slot: int
    first: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.blocks)

    def extend(self, blocks: list[int]) -> None:
        self.table[self.slot, self.end : self.end + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.blocks += blocks

    def drop_before(self, entry: int) -> None:
        count = max(0, min(entry, self.end) - self.first)
        self.pool.free(self.blocks[:count])
        del self.blocks[:count]
        self.first += count

    @property
    def bytes(self) -> int:
        return len(self.blocks) * self.pool.page_bytes


@dataclass(eq=False)
class KiviSequence(Sequence):
    stores: dict[str, Blocks] = field(default_factory=dict)


@KV_CACHES.add(
    options=KiviOptions,
    card=Card(
        title="KIVI",
        idea="Pack old keys per channel and old values per token into 2 or 4 bits; keep the latest in full.",
        exactness="As published, plus grouped-query attention. Lossy; bits=16 is lossless. With two 16-bit "
        "constants a group, 2 bits and groups of 32 are 3 effective bits.",
        cost="(bits + 32 / group_size) / 16 of the bytes for old tokens, all of them for the latest "
        "`residual`; the prompt is held in full until its end; one unpacking of every code a step.",
        needs="group_size divides the head size and residual; a model without a sliding window of its own.",
        avoid_when="Contexts are shorter than a few times the residual, or the cache is small anyway.",
        paper="Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024",
        arxiv="2402.02750",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC, texts of 640 tokens: "
        "2 bits: 696 KiB held (full 1.9 MiB), perplexity +0.46, needle 83% (83%), 0.64 ms a token (0.25).",
    ),
)
class Kivi(KVCache):
    chunks_generated = False

    @staticmethod
    def problems(options: KiviOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = []
        if config.head_dim % options.group_size:
            found.append(
                f"group_size {options.group_size} does not divide the model's head size {config.head_dim}"
            )
        if any(config.sliding_windows):
            found.append("the model's own sliding-window layers already forget; use cache=full")
        return found

    def __init__(self, shape: KVShape, options: KiviOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        blocks = (shape.max_length + shape.max_step_tokens) // PAGE + 1
        slots = shape.max_sequences
        tables = {n: torch.zeros(slots, blocks, dtype=torch.int32) for n in _STORES}
        rows = PagedRows(
            arena=torch.empty(0),
            table=tables["k_full"],
            start=torch.zeros(slots, dtype=torch.int32),
            spans=torch.zeros(0, 3, dtype=torch.int32),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            table_seq=blocks,
            start_seq=1,
        )
        self.packed = PackedRows(
            rows=rows,
            arena=torch.empty(0),
            k_full=tables["k_full"],
            v_full=tables["v_full"],
            k_packed=tables["k_packed"],
            v_packed=tables["v_packed"],
            k_done=torch.zeros(slots, dtype=torch.int32),
            v_done=torch.zeros(slots, dtype=torch.int32),
            bits=options.bits,
            group=options.group_size,
            num_layers=shape.num_layers,
        )
        p = self.packed
        full = p.full_unit(shape.item_bytes)
        sizes = {"k_full": full, "v_full": full, "k_packed": p.k_unit, "v_packed": p.v_unit}
        self.arena = Arena(memory_bytes, [size * p.n_units for size in sizes.values()], shape.device)
        self.pools = {name: PagePool(self.arena, size * p.n_units) for name, size in sizes.items()}
        p.arena = self.arena.bytes
        rows.arena = self.arena.bytes.view(shape.dtype)
        self.packs = options.bits < 16

    def new_sequence(self, slot: int, prompt_length: int) -> KiviSequence:
        p = self.packed
        p.rows.start[slot] = p.k_done[slot] = p.v_done[slot] = 0
        stores = {name: Blocks(self.pools[name], getattr(p, name), slot) for name in _STORES}
        return KiviSequence(slot, prompt_length, stores=stores)

    def release(self, sequence: Sequence) -> None:
        assert isinstance(sequence, KiviSequence)
        for store in sequence.stores.values():
            store.drop_before(store.end)

    def _done(self, sequence: Sequence, length: int) -> tuple[int, int]:
        """How many keys and values are packed once `length` tokens are committed."""
        if not self.packs or length < sequence.prompt_length:
            return 0, 0
        residual = self.options.residual
        return length // residual * residual, max(0, length - residual)

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Also the room that packing at the commit will need, so that a commit cannot fail."""
        assert isinstance(sequence, KiviSequence)
        end = sequence.length + count
        k_done, v_done = self._done(sequence, end)
        pages = -(-end // PAGE)
        ends = {
            "k_full": pages,
            "v_full": pages,
            "k_packed": k_done // self.options.group_size,
            "v_packed": -(-v_done // PAGE),
        }
        taken: list[tuple[Blocks, list[int]]] = []
        for name, wanted in ends.items():
            store = sequence.stores[name]
            if wanted > store.end:
                blocks = store.pool.alloc_many(wanted - store.end)
                if blocks is None:
                    for other, pages_taken in taken:
                        other.pool.free(pages_taken)
                    return False
                taken.append((store, blocks))
        for store, blocks in taken:
            store.extend(blocks)
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels, p = self.shape.kernels, self.packed
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        p.layer = layer
        p.rows.spans, p.rows.mask = rows.spans, rows.mask
        kernels.write_packed(p, k, v)
        return kernels.attend_packed(p, q)

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        sequence, s, p = rows.sequences[span], self.shape, self.packed
        flat = p.rows.arena.view(-1, p.n_units, PAGE * s.head_dim)
        keys, values = flat.unflatten(-1, (s.head_dim, PAGE)), flat.unflatten(-1, (PAGE, s.head_dim))
        source = (torch.tensor(order) + sequence.length).to(s.device)
        target = (torch.arange(len(order)) + sequence.length).to(s.device)
        k_page, v_page = (t[sequence.slot].long().to(s.device) for t in (p.k_full, p.v_full))
        keys[k_page[target // PAGE], :, :, target % PAGE] = keys[k_page[source // PAGE], :, :, source % PAGE]
        values[v_page[target // PAGE], :, target % PAGE] = values[v_page[source // PAGE], :, source % PAGE]

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        p = self.packed
        for sequence in rows.sequences:
            assert isinstance(sequence, KiviSequence)
            slot = sequence.slot
            k_done, v_done = self._done(sequence, sequence.length)
            k_from, v_from = int(p.k_done[slot]), int(p.v_done[slot])
            if k_done > k_from or v_done > v_from:
                group = self.options.group_size
                groups = range(k_from // group, k_done // group)
                self.shape.kernels.pack(p, slot, groups, range(v_from, v_done))
                self.bytes_moved += (k_done - k_from + v_done - v_from) * self.shape.token_bytes // 2
                p.k_done[slot], p.v_done[slot] = k_done, v_done
                sequence.stores["k_full"].drop_before(k_done // PAGE)
                sequence.stores["v_full"].drop_before(v_done // PAGE)
            p.rows.start[slot] = sequence.length

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_held(self) -> int:
        return sum(pool.bytes_used for pool in self.pools.values())

    def held_by(self, sequence: Sequence) -> int:
        assert isinstance(sequence, KiviSequence)
        return sum(store.bytes for store in sequence.stores.values())

    def read_per_step(self, sequence: Sequence) -> int:
        p, slot = self.packed, sequence.slot
        k_done, v_done = int(p.k_done[slot]), int(p.v_done[slot])
        packed = k_done // p.group * p.k_unit + -(-v_done // PAGE) * p.v_unit
        full = (2 * sequence.length - k_done - v_done) * self.shape.row_bytes // 2
        return packed * p.n_units + full * p.n_units

    def check(self) -> None:
        self.arena.check()


_STORES = ("k_full", "v_full", "k_packed", "v_packed")
