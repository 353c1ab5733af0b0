"""SnapKV: at the prompt's end, keep what the last queries of the prompt look at.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024, arXiv 2404.14469.

Once, when the prompt is complete: the attention of its last `window` queries (causal inside the window) is
summed over those queries, smoothed along the positions, and each head keeps the `budget - window` best
places of the rest plus the window itself. Generated tokens are all kept.

Exact as published, but scores are summed over a group's query heads (GQA) where the release keeps one copy
a query head, and the strip of probabilities is computed apart so that prefill stays fused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kvcache.base import Sequence, StepRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class SnapKVOptions:
    budget: int = field(default=256, metadata={"help": "rows a head keeps of the prompt, window included"})
    window: int = field(default=32, metadata={"help": "last prompt tokens whose queries vote"})
    kernel: int = field(default=5, metadata={"help": "width of the smoothing along positions, odd"})
    pooling: Literal["avg", "max"] = field(default="avg", metadata={"help": "smoothing of the votes"})

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"option 'window' of snapkv is {self.window}; it must be at least 1")
        if self.budget <= self.window:
            raise ConfigError(
                f"option 'budget' of snapkv is {self.budget}; it must be above the window of {self.window}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"option 'kernel' of snapkv is {self.kernel}; it must be odd and at least 1")


@dataclass(eq=False)
class SnapKVSequence(Sequence):
    queries: Tensor | None = None  # float32 [L, window, H, d] of the prompt's last tokens, until its end


@KV_CACHES.add(
    options=SnapKVOptions,
    card=Card(
        title="SnapKV",
        idea="When the prompt is complete, each head keeps only the places its last queries look at.",
        exactness="As published; a group's query heads vote together (the release keeps a copy for each).",
        cost="`budget` rows a head of the prompt plus all generated ones; one small strip of attention a "
        "layer, once a prompt.",
        needs="A model without a sliding window of its own; the whole prompt held once, until its end.",
        avoid_when="The question comes after the compression (chat on a stored document), or the output is "
        "far longer than the prompt.",
        paper="Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024",
        arxiv="2404.14469",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC, texts of 640 tokens: "
        "1.1 MiB held (full 1.9 MiB), perplexity +0.77, needle 65% (83%), 0.62 ms a token (0.25).",
    ),
)
class SnapKV(RowPolicy):
    chunks_generated = False

    @staticmethod
    def problems(options: SnapKVOptions, plan: Plan, config: ModelConfig) -> list[str]:
        if any(config.sliding_windows):
            return ["the model's own sliding-window layers already forget; use cache=full"]
        return []

    def make_sequence(self, slot: int, prompt_length: int) -> SnapKVSequence:
        s = self.shape
        queries = None
        if prompt_length > self.options.budget:
            queries = torch.empty(s.num_layers, self.options.window, s.num_heads, s.head_dim, device=s.device)
        return SnapKVSequence(slot, prompt_length, queries=queries)

    def notes(self, rows: StepRows) -> bool:
        return any(s.queries is not None for s in rows.sequences if isinstance(s, SnapKVSequence))

    def note(self, layer: int, q: Tensor, lse: Tensor, rows: StepRows) -> None:
        for sequence, (begin, end) in zip(rows.sequences, rows.bounds, strict=True):
            assert isinstance(sequence, SnapKVSequence)
            if sequence.queries is None:
                continue
            first = sequence.prompt_length - self.options.window
            skip = max(0, first - sequence.length)
            if skip < end - begin:
                at = sequence.length + skip - first
                sequence.queries[layer, at : at + end - begin - skip] = q[begin + skip : end]

    def choose(self, sequence: Sequence, count: int) -> None:
        assert isinstance(sequence, SnapKVSequence)
        if sequence.queries is not None and sequence.length >= sequence.prompt_length:
            self._compress(sequence, sequence.queries)
            sequence.queries = None

    def _compress(self, sequence: SnapKVSequence, queries: Tensor) -> None:
        window, total, slot = self.options.window, sequence.prompt_length, sequence.slot
        s = self.shape
        span = torch.tensor([[slot, 0, window]], dtype=torch.int32)
        start = self.rows.length.clone()
        start[slot] -= window
        votes = torch.zeros(s.num_layers, 1, s.num_kv_heads, total, device=s.device)
        for layer in range(s.num_layers):
            self.rows.column_sums(layer, queries[layer], span, votes[layer], start=start)
        rest = votes[:, 0, :, : total - window].cpu()
        pool = F.avg_pool1d if self.options.pooling == "avg" else F.max_pool1d
        smooth = pool(rest, self.options.kernel, stride=1, padding=self.options.kernel // 2)
        # Smoothing makes equal neighbours; the sort is stable, so that the earlier place wins everywhere.
        order = smooth.argsort(dim=2, descending=True, stable=True)
        chosen = order[..., : self.options.budget - window].sort(2).values
        last = torch.arange(total - window, total).expand(*chosen.shape[:2], window)
        self.bytes_moved += self.rows.keep(slot, torch.cat([chosen, last], 2))

    def beside(self, sequence: Sequence) -> int:
        """Queries kept for a prompt that is not complete."""
        assert isinstance(sequence, SnapKVSequence)
        return 0 if sequence.queries is None else sequence.queries.nbytes
