"""StreamingLLM: keep the first few tokens and a window of the latest, with positions inside the cache.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453.

A query sees the `sinks` first tokens and the `window` latest (itself included), as if the text consisted of
just those: key number r of the cache stands at position r. So positions never exceed sinks + window and a
text may go on forever at flat memory.

How positions inside the cache come without rotating any key again: attention only sees position
*differences*. Within the window they are those of the text. Between a query and the sinks the difference is
query's cache position minus sink's index. So the window is one segment with logical positions, the sinks are
a second segment asked by the same query rotated to its cache position, and the two are merged.

Exact: every row is treated as if tokens had come one by one; the result does not depend on chunking (the
released code drops rows once a chunk, so inside a chunk its window is longer).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows, move_rows
from trimtab.kvcache.paging.arena import Arena, PagePool
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class StreamingOptions:
    sinks: int = field(default=4, metadata={"help": "first tokens kept forever; 0 = window only"})
    window: int = field(default=252, metadata={"help": "latest tokens kept, the query's own included"})
    positions: Literal["cache", "logical"] = field(
        default="cache", metadata={"help": "positions inside the cache (paper), or in the text (ablation)"}
    )

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ConfigError(f"option 'sinks' of streaming is {self.sinks}; it must be 0 or more")
        if self.window < 1:
            raise ConfigError(f"option 'window' of streaming is {self.window}; it must be at least 1")


@dataclass(eq=False)
class StreamingSequence(Sequence):
    sink_blocks: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    dropped: int = 0  # rows of the window store already given back, a multiple of PAGE


@KV_CACHES.add(
    options=StreamingOptions,
    card=Card(
        title="StreamingLLM",
        idea="Keep the first tokens (attention sinks) and a window of the latest ones; forget the middle.",
        exactness="Exact as published, row by row. Lossy by design: what left the window cannot be recalled.",
        cost="(sinks + window) rows a layer and head however long the text; two attention segments a layer.",
        needs="A model without a sliding window of its own; sinks + window within its trained context.",
        avoid_when="The answer may lie in the forgotten middle (retrieval, long documents).",
        paper="Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023",
        arxiv="2309.17453",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC, texts of 640 tokens: "
        "816 KiB held (full 1.9 MiB), perplexity +1.27, needle 55% (83%), 1.09 ms a token (0.25).",
    ),
)
class Streaming(KVCache):
    endless = True
    alone_because = "it holds a few rows in full, at positions inside the cache; make its window smaller"

    @staticmethod
    def problems(options: StreamingOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = []
        size = options.sinks + options.window
        if size > config.context_length:
            found.append(
                f"sinks + window is {size}, more than the model's context of {config.context_length}"
            )
        if any(config.sliding_windows):
            found.append("the model's own sliding-window layers already forget; use cache=full")
        if config.rope.kind == "dynamic":
            found.append("dynamic rope scaling changes with the text's length, which here has no end")
        return found

    def __init__(self, shape: KVShape, options: StreamingOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self.sinks, self.window = options.sinks, options.window
        block_bytes = PAGE * shape.token_bytes
        self.arena = Arena(memory_bytes, [block_bytes], shape.device)
        self.pool = PagePool(self.arena, block_bytes)
        slots = shape.max_sequences
        self._sink = self._store(max(1, -(-self.sinks // PAGE)))
        self._recent = self._store((self.window + shape.max_step_tokens) // PAGE + 2)
        self._sink_seen = torch.zeros(slots, dtype=torch.int32)  # `start` that makes all sinks visible

    def _store(self, blocks: int) -> PagedRows:
        s = self.shape
        return PagedRows(
            arena=self.pool.view(s.dtype),
            table=torch.zeros(s.max_sequences, blocks, dtype=torch.int32),
            start=torch.zeros(s.max_sequences, dtype=torch.int32),
            spans=torch.zeros(0, 3, dtype=torch.int32),
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            scale=s.scale,
            table_seq=blocks,
            start_seq=1,
            page_mul=s.num_layers * s.num_kv_heads,
            page_head=1,
        )

    def new_sequence(self, slot: int, prompt_length: int) -> StreamingSequence:
        self._sink.start[slot] = self._recent.start[slot] = 0
        return StreamingSequence(slot, prompt_length)

    def release(self, sequence: Sequence) -> None:
        assert isinstance(sequence, StreamingSequence)
        self.pool.free(sequence.sink_blocks + sequence.blocks)

    def reserve(self, sequence: Sequence, count: int) -> bool:
        assert isinstance(sequence, StreamingSequence)
        end = sequence.length + count
        sinks = -(-min(end, self.sinks) // PAGE) - len(sequence.sink_blocks)
        recent = -(-(max(0, end - self.sinks) - sequence.dropped) // PAGE) - len(sequence.blocks)
        if sinks <= 0 and recent <= 0:
            return True
        blocks = self.pool.alloc_many(max(sinks, 0) + max(recent, 0))
        if blocks is None:
            return False
        sequence.sink_blocks += blocks[: max(sinks, 0)]
        sequence.blocks += blocks[max(sinks, 0) :]
        self._write_tables(sequence)
        return True

    def _write_tables(self, sequence: StreamingSequence) -> None:
        for store, blocks in ((self._sink, sequence.sink_blocks), (self._recent, sequence.blocks)):
            store.table[sequence.slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def begin(self, rows: StepRows) -> None:
        """Split each span into rows that are sinks themselves and rows behind them."""
        first: list[list[int]] = []
        rest: list[list[int]] = []
        for sequence, (begin, end) in zip(rows.sequences, rows.bounds, strict=True):
            cut = min(end, begin + max(0, self.sinks - sequence.length))
            if cut > begin:
                first.append([sequence.slot, begin, cut])
            if end > cut:
                rest.append([sequence.slot, cut, end])
                self._sink_seen[sequence.slot] = self.sinks - (end - cut)
        # The mask's squares are those of whole spans; drafts in a text shorter than the sinks are chains.
        assert rows.mask is None or not first, "a tree of drafts among the sinks"
        self._first = torch.tensor(first, dtype=torch.int32).view(-1, 3)
        self._rest = torch.tensor(rest, dtype=torch.int32).view(-1, 3)
        inside = rows.positions
        if self.options.positions == "cache":
            inside = inside.clamp(max=self.sinks + self.window - 1)
        cos, sin = self.shape.rotary.cos_sin(inside)
        self._inside = cos.to(rows.cos.device), sin.to(rows.cos.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels = self.shape.kernels
        add = layer * self.shape.num_kv_heads
        segments = []
        kernels.rotate(k, rows.cos, rows.sin)
        if self.sinks:
            q_inside = q.clone()
            kernels.rotate(q_inside, *self._inside)
            call = self._sink
            call.page_add = add
            if len(self._first):
                call.spans, call.causal_new = self._first, True
                kernels.write(call, k, v)
                segments.append(kernels.attend(call, q_inside))
            if len(self._rest):
                held, call.start = call.start, self._sink_seen
                call.spans, call.causal_new = self._rest, False
                segments.append(kernels.attend(call, q_inside))
                call.start = held
        if len(self._rest):
            kernels.rotate(q, rows.cos, rows.sin)
            call = self._recent
            call.spans, call.page_add, call.window = self._rest, add, self.window
            call.mask, call.depth = rows.mask, rows.depth
            kernels.write(call, k, v)
            segments.append(kernels.attend(call, q))
        return kernels.merge(segments)

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        slot = rows.sequences[span].slot
        held = int(self._recent.start[slot])
        source, target = torch.tensor(order) + held, torch.arange(len(order)) + held
        move_rows(self._recent.arena, self.shape, self._recent.table[slot], source, target)

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        for sequence in rows.sequences:
            assert isinstance(sequence, StreamingSequence)
            recent = max(0, sequence.length - self.sinks)
            # The next query sees keys from here on.
            first = recent - self.window + 1
            expired = (first - sequence.dropped) // PAGE
            if expired > 0:
                self.pool.free(sequence.blocks[:expired])
                del sequence.blocks[:expired]
                sequence.dropped += expired * PAGE
                self._write_tables(sequence)
            self._sink.start[sequence.slot] = min(sequence.length, self.sinks)
            self._recent.start[sequence.slot] = recent - sequence.dropped

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_held(self) -> int:
        return self.pool.bytes_used

    def held_by(self, sequence: Sequence) -> int:
        assert isinstance(sequence, StreamingSequence)
        return (len(sequence.sink_blocks) + len(sequence.blocks)) * self.pool.page_bytes

    def read_per_step(self, sequence: Sequence) -> int:
        return min(sequence.length, self.sinks + self.window) * self.shape.token_bytes

    def check(self) -> None:
        self.arena.check()
