"""SnapKV: at the prompt's end, keep what the last queries of the prompt look at.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024, arXiv 2404.14469.

Once, when the prompt is complete: the attention of its last `window` queries (causal inside the window) is
summed over those queries, smoothed along the rows, and each head keeps the `budget - window` best places of
the rest plus the window itself. Generated tokens are all kept.

Exact as published, but scores are summed over a group's query heads (GQA) where the release keeps one copy
a query head, and the strip of probabilities is computed apart so that prefill stays fused. With `chunk` and
`interval` the same is done inside the prompt and while decoding, with the latest `window` tokens there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kvcache.paging.evicting import EvictedSequence
from trimtab.kvcache.paging.scored import Scored, ScoredOptions, Scorer
from trimtab.kvcache.paging.votes import votes
from trimtab.registry import KV_CACHES, Card


@dataclass(frozen=True, slots=True)
class SnapKVOptions(ScoredOptions):
    window: int = field(default=32, metadata={"help": "last prompt tokens whose queries vote"})
    kernel: int = field(default=5, metadata={"help": "width of the smoothing along rows, odd"})
    pooling: Literal["avg", "max"] = field(default="avg", metadata={"help": "smoothing of the votes"})

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"option 'window' of snapkv is {self.window}; it must be at least 1")
        self.check("snapkv", self.window, "the window")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"option 'kernel' of snapkv is {self.kernel}; it must be odd and at least 1")


class Votes(Scorer):
    """What a row receives from the latest queries. Notes: a ring of those, float32 [L, window, H, d]."""

    options: SnapKVOptions

    @staticmethod
    def protected(options: SnapKVOptions) -> int:
        return options.window

    def new_notes(self) -> tuple[Tensor, ...]:
        s = self.shape
        return (torch.empty(s.num_layers, self.options.window, s.num_heads, s.head_dim, device=s.device),)

    def first_asked(self, sequence: EvictedSequence) -> int:
        return sequence.due - self.options.window

    def take(self, sequence: EvictedSequence, first: int, queries: Tensor) -> None:
        n = queries.shape[1]
        last = min(n, self.options.window)
        at = torch.arange(first + n - last, first + n, device=queries.device) % self.options.window
        sequence.notes[0][:, at] = queries[:, n - last :]

    def scores(self, sequence: EvictedSequence) -> Tensor:
        window, ring = self.options.window, sequence.notes[0]
        order = torch.arange(sequence.length - window, sequence.length, device=ring.device) % window
        received = votes(self.rows, sequence.slot, ring[:, order])
        end = self.rows.length[sequence.slot][..., None]
        at = torch.arange(received.shape[2])
        recent = at >= end - window
        rest = received.masked_fill(recent, 0)
        pool = F.avg_pool1d if self.options.pooling == "avg" else F.max_pool1d
        smooth = pool(rest, self.options.kernel, stride=1, padding=self.options.kernel // 2)
        return smooth.masked_fill(recent, torch.inf).masked_fill(at >= end, -torch.inf)


@KV_CACHES.add(
    options=SnapKVOptions,
    card=Card(
        title="SnapKV",
        idea="When the prompt is complete, each head keeps only the places its last queries look at.",
        exactness="As published; a group's query heads vote together (the release keeps a copy for each).",
        cost="`budget` rows a head of the prompt plus all generated ones (with `interval` only the latest); "
        "one small strip of attention a layer, once a prompt.",
        needs="A model without a sliding window of its own; without `chunk` the whole prompt held once, "
        "until its end.",
        avoid_when="The question comes after the compression (chat on a stored document), or the output is "
        "far longer than the prompt.",
        paper="Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024",
        arxiv="2404.14469",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: budget=25%: "
        "1.9 MiB held (full 6.0), perplexity -1.4%, needle 30% (40%), 1.45x the speed of full.",
    ),
)
class SnapKV(Scored):
    scorer = Votes
