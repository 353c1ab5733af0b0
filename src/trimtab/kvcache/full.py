"""Everything, in the model's own type: the plain cache, paged, with prefixes shared between requests.

Exact. A block is 16 tokens of all layers and heads, so a text of T tokens holds ceil(T / 16) blocks; those
of a common beginning are held once, and on the C++ kernels read once for all texts that share them:

Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, 2024, arXiv 2402.05099.

Who shares what is found step by step from the tables of pages, at any depth of a tree of common beginnings,
in units of 512 tokens; results are those of attending alone, bit for bit (kernels/cpu/shared.h).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows, move_rows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.kvcache.paging.prefix import SharedBlocks
from trimtab.registry import KV_CACHES, Card


@dataclass(frozen=True, slots=True)
class FullOptions:
    hydragen: bool = field(
        default=True, metadata={"help": "texts that share a beginning attend to it together (Hydragen)"}
    )


@dataclass(eq=False)
class FullSequence(Sequence):
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the blocks already published


@KV_CACHES.add(
    options=FullOptions,
    card=Card(
        title="Full cache",
        idea="Keep every key and value of every layer and head, in pages; common beginnings are shared.",
        exactness="Exact: equal to recomputing the whole text.",
        cost="2 x layers x KV heads x head size x bytes per number a token, all of it read every step.",
        needs="Nothing.",
        avoid_when="Contexts or batches are so large that the cache fills memory or bandwidth.",
        paper="Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023 (paging)",
        arxiv="2309.06180",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 6.0 MiB held,"
        " perplexity 36.9, needle 40%, 1.05 ms a token.",
    ),
)
class Full(KVCache):
    shares_prefix = True
    alone_because = "it keeps every row as it is, shared between requests; any other method replaces it"

    def __init__(self, shape: KVShape, options: FullOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        block_bytes = PAGE * shape.token_bytes
        self.arena = Arena(memory_bytes, [block_bytes], shape.device)
        self.pool = PagePool(self.arena, block_bytes)
        self.shared = SharedBlocks(self.pool, PAGE, self.fingerprint)
        per_text = (shape.max_length + shape.max_step_tokens) // PAGE + 1
        self.table = torch.zeros(shape.max_sequences, per_text, dtype=torch.int32)
        self.start = torch.zeros(shape.max_sequences, dtype=torch.int32)
        self._table, self._start = self.table.numpy(), self.start.numpy()
        self._rows = PagedRows(
            arena=self.pool.view(shape.dtype),
            table=self.table,
            start=self.start,
            spans=self.table,  # replaced each step
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            table_seq=per_text,
            start_seq=1,
            page_mul=shape.num_layers * shape.num_kv_heads,
            page_head=1,
            page_layer=shape.num_kv_heads,
            share=options.hydragen,
        )

    def new_sequence(self, slot: int, prompt_length: int) -> FullSequence:
        self._start[slot] = 0
        return FullSequence(slot, prompt_length)

    def release(self, sequence: Sequence) -> None:
        assert isinstance(sequence, FullSequence)
        self.shared.release(sequence.blocks)
        sequence.blocks = []

    def reserve(self, sequence: Sequence, count: int) -> bool:
        assert isinstance(sequence, FullSequence)
        have = len(sequence.blocks)
        need = (sequence.length + count + PAGE - 1) // PAGE - have
        if need <= 0:
            return True
        blocks = self.shared.alloc(need)
        if blocks is None:
            return False
        self._extend(sequence, blocks)
        return True

    def _extend(self, sequence: FullSequence, blocks: list[int]) -> None:
        have = len(sequence.blocks)
        self._table[sequence.slot, have : have + len(blocks)] = blocks
        sequence.blocks += blocks

    def adopt_prefix(self, sequence: Sequence, tokens: Seq[int]) -> int:
        assert isinstance(sequence, FullSequence) and not sequence.blocks
        # The last token is always computed, so that its logits exist.
        blocks, sequence.keys = self.shared.find(tokens, (len(tokens) - 1) // PAGE)
        self._extend(sequence, blocks)
        sequence.length = len(blocks) * PAGE
        self._start[sequence.slot] = sequence.length
        return sequence.length

    def publish_prefix(self, sequence: Sequence, tokens: Seq[int]) -> None:
        assert isinstance(sequence, FullSequence)
        while (len(sequence.keys) + 1) * PAGE <= sequence.length:
            i = len(sequence.keys)
            parent = sequence.keys[-1] if sequence.keys else self.shared.root
            key = self.shared.key(parent, tokens[i * PAGE : (i + 1) * PAGE])
            self.shared.publish(sequence.blocks[i], key)
            sequence.keys.append(key)

    def whole_step(self, rows: StepRows) -> PagedRows:
        call = self._rows
        call.spans, call.mask, call.depth = rows.spans, rows.mask, rows.depth
        call.page_add, call.window = 0, 0
        return call

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels = self.shape.kernels
        call = self.whole_step(rows)
        call.page_add = layer * self.shape.num_kv_heads
        call.window = self.shape.windows[layer] or 0
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        kernels.write(call, k, v)
        return kernels.attend(call, q)[0]

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        sequence = rows.sequences[span]
        source = torch.tensor(order) + sequence.length
        target = torch.arange(len(order)) + sequence.length
        move_rows(self._rows.arena, self.shape, self.table[sequence.slot], source, target)

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        for sequence in rows.sequences:
            self._start[sequence.slot] = sequence.length

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_held(self) -> int:
        return self.shared.bytes_used

    @property
    def bytes_cached(self) -> int:
        return self.shared.bytes_cached

    def held_by(self, sequence: Sequence) -> int:
        assert isinstance(sequence, FullSequence)
        return len(sequence.blocks) * self.pool.page_bytes

    def read_per_step(self, sequence: Sequence) -> int:
        rows = sum(min(sequence.length, w or sequence.length) for w in self.shape.windows)
        return rows * self.shape.num_kv_heads * self.shape.row_bytes

    def check(self) -> None:
        self.arena.check()
        self.shared.check()
