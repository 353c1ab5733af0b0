"""StreamingLLM: keep the first few tokens and a window of the latest, with positions inside the cache.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453.

A query sees the `sinks` first tokens and the `window` latest (itself included), as if the text consisted of
just those: key number r of the cache stands at position r. So positions never exceed sinks + window and a
text may go on forever at flat memory.

How positions inside the cache come without rotating any key again: attention only sees position
*differences*. Within the window they are those of the text. Between a query and the sinks the difference is
query's cache position minus sink's index. So the sinks are asked by the same query, rotated to its position
in the cache.

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
    blocks: dict[int, int] = field(default_factory=dict)  # 16 tokens of the text, by number -> block


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
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 816 KiB held "
        "(full 6.0 MiB), perplexity -0.4%, needle 20% (40%), 1.32x the speed of full.",
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
        s, self.sinks, self.window = shape, options.sinks, options.window
        block_bytes = PAGE * s.token_bytes
        self.arena = Arena(memory_bytes, [block_bytes], s.device)
        self.pool = PagePool(self.arena, block_bytes)
        self.sink_blocks = -(-self.sinks // PAGE)
        ring = (self.window + s.max_step_tokens) // PAGE + 2
        units = s.num_layers * s.num_kv_heads
        self._inside: tuple[Tensor, Tensor] | None = None  # cosines and sines of positions in the cache
        self._rows = PagedRows(
            arena=self.pool.view(s.dtype),
            table=torch.zeros(s.max_sequences, self.sink_blocks + ring, dtype=torch.int32),
            start=torch.zeros(s.max_sequences, dtype=torch.int32),
            spans=torch.zeros(0, 3, dtype=torch.int32),
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            scale=s.scale,
            table_seq=self.sink_blocks + ring,
            start_seq=1,
            page_mul=units,
            page_head=1,
            page_layer=s.num_kv_heads,
            head_window=torch.full((units,), self.window, dtype=torch.int32),
            head_sinks=torch.full((units,), self.sinks, dtype=torch.int32),
            fixed=self.sink_blocks,
            ring=ring,
        )

    def new_sequence(self, slot: int, prompt_length: int) -> StreamingSequence:
        self._rows.start[slot] = 0
        return StreamingSequence(slot, prompt_length)

    def release(self, sequence: Sequence) -> None:
        assert isinstance(sequence, StreamingSequence)
        self.pool.free(list(sequence.blocks.values()))

    def _wanted(self, length: int, end: int) -> range:
        """Blocks behind the sinks' that queries from `length` on see, up to `end` tokens."""
        first = max(self.sink_blocks, (length + 1 - self.window) // PAGE)
        return range(first, -(-end // PAGE))

    def reserve(self, sequence: Sequence, count: int) -> bool:
        assert isinstance(sequence, StreamingSequence)
        end = sequence.length + count
        wanted = [*range(min(self.sink_blocks, -(-end // PAGE))), *self._wanted(sequence.length, end)]
        recent = -count // PAGE - 2  # all others are there since an earlier step
        missing = [i for i in wanted[recent:] if i not in sequence.blocks]
        if not missing:
            return True
        blocks = self.pool.alloc_many(len(missing))
        if blocks is None:
            return False
        table, r = self._rows.table[sequence.slot], self._rows
        for i, block in zip(missing, blocks, strict=True):
            sequence.blocks[i] = block
            table[i if i < r.fixed else r.fixed + (i - r.fixed) % r.ring] = block
        return True

    def begin(self, rows: StepRows) -> None:
        r = self._rows
        r.spans, r.mask, r.depth = rows.spans, rows.mask, rows.depth
        r.sinks_cos_sin = None
        # Up to here a query stands in the cache where it stands in the text.
        last = self.sinks + self.window - 1
        if self.sinks and self.options.positions == "cache" and int(rows.positions.max()) > last:
            if self._inside is None:
                cos, sin = self.shape.rotary.cos_sin(torch.arange(last + 1))
                self._inside = cos.to(rows.cos.device), sin.to(rows.cos.device)
            at = rows.positions.clamp(max=last).to(rows.cos.device)
            r.sinks_cos_sin = self._inside[0][at], self._inside[1][at]

    def whole_step(self, rows: StepRows) -> PagedRows:
        self._rows.page_add = self._rows.head_offset = 0
        self._rows.q_sinks = None
        return self._rows

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels, r = self.shape.kernels, self._rows
        r.page_add = r.head_offset = layer * self.shape.num_kv_heads
        r.q_sinks = None
        if r.sinks_cos_sin is not None:
            r.q_sinks = q.clone()
            kernels.rotate(r.q_sinks, *r.sinks_cos_sin)
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        kernels.write(r, k, v)
        return kernels.attend(r, q)[0]

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        sequence, r = rows.sequences[span], self._rows
        assert isinstance(sequence, StreamingSequence)
        source, target = torch.tensor(order) + sequence.length, torch.arange(len(order)) + sequence.length
        first = sequence.length // PAGE
        pages = [sequence.blocks[i] for i in range(first, max(sequence.blocks) + 1)]
        back = first * PAGE
        move_rows(r.arena, self.shape, torch.tensor(pages), source - back, target - back)

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        for sequence in rows.sequences:
            assert isinstance(sequence, StreamingSequence)
            self._rows.start[sequence.slot] = sequence.length
            first = self._wanted(sequence.length, sequence.length).start
            expired = [i for i in sequence.blocks if self.sink_blocks <= i < first]
            if expired:
                self.pool.free([sequence.blocks.pop(i) for i in expired])

    @property
    def bytes_capacity(self) -> int:
        return self.arena.total

    @property
    def bytes_held(self) -> int:
        return self.pool.bytes_used

    def held_by(self, sequence: Sequence) -> int:
        assert isinstance(sequence, StreamingSequence)
        return len(sequence.blocks) * self.pool.page_bytes

    def read_per_step(self, sequence: Sequence) -> int:
        return min(sequence.length, self.sinks + self.window) * self.shape.token_bytes

    def check(self) -> None:
        self.arena.check()
