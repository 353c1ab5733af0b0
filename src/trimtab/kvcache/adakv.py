"""Ada-KV: a layer's rows go to the heads that need them, instead of equally many to each.

Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference,
2024, arXiv 2407.11550.

Scores are those of another method (`scorer`, with its options as in a plan: `'snapkv:window=8'`). A layer's
`budget` x KV heads rows are given to its best-scored rows over all heads together; each head keeps at least
`safeguard` of an even share, its own best ones, and what the scorer protects.

As published. Heads really differ in length here: rows that a head loses are pages for others to use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kvcache.paging.scored import Scored, ScoredOptions, Scorer
from trimtab.plan import split_method
from trimtab.registry import KV_CACHES, Card

_SCORERS = ("snapkv", "expected_attention")


@dataclass(frozen=True, slots=True)
class AdaKVOptions(ScoredOptions):
    scorer: str = field(
        default="snapkv",
        metadata={"help": "snapkv or expected_attention, with its own options: 'snapkv:window=8'"},
    )
    safeguard: float = field(default=0.2, metadata={"help": "share of an even budget that each head has"})

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise ConfigError(f"option 'safeguard' of adakv is {self.safeguard}; it must be from 0 to 1")
        kind, options = self.scoring
        self.check("adakv", kind.protected(options), f"what {self.scorer} protects")

    @property
    def scoring(self) -> tuple[type[Scorer], Any]:
        """The scorer and its options, which share budget, chunk and interval with these."""
        name, raw = split_method(self.scorer, "option 'scorer' of adakv")
        if name not in _SCORERS:
            raise ConfigError(f"option 'scorer' of adakv is {self.scorer!r}; allowed: {', '.join(_SCORERS)}")
        for given in ("budget", "chunk", "interval"):
            if given in raw:
                raise ConfigError(
                    f"option 'scorer' of adakv is {self.scorer!r}; give {given!r} to adakv itself"
                )
        options = KV_CACHES.build_options(name, {**raw, "budget": "100%"})
        return KV_CACHES.get(name).cls.scorer, options


@KV_CACHES.add(
    options=AdaKVOptions,
    card=Card(
        title="Ada-KV",
        idea="A layer's budget goes to its best rows over all heads: heads with more to keep may keep more.",
        exactness="As published, with the scores of SnapKV or of expected attention.",
        cost="Bytes as the scorer's method at the same budget; pages are filled a little less evenly.",
        needs="A model without a sliding window of its own, with more than one KV head.",
        avoid_when="All heads look equally far: nothing is gained over even budgets.",
        paper="Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient "
        "LLM Inference, 2024",
        arxiv="2407.11550",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: budget=25%: "
        "1.9 MiB held (full 6.0), perplexity -1.2%, needle 30% (40%), 1.10x the speed of full.",
    ),
)
class AdaKV(Scored):
    options: AdaKVOptions

    def _scoring(self) -> Scorer:
        kind, options = self.options.scoring
        return kind(self.shape, self.rows, options)

    def pick(self, scores: Tensor, keep: int) -> Tensor:
        layers, heads, n = scores.shape
        order = scores.argsort(dim=2, descending=True, stable=True)
        safe = scores.scatter(2, order[..., : int(keep * self.options.safeguard)], torch.inf)
        safe.masked_fill_(scores == -torch.inf, -torch.inf)  # a head may have fewer rows than that
        best = safe.flatten(1).argsort(dim=1, descending=True, stable=True)[:, : keep * heads]
        return torch.zeros(layers, heads * n, dtype=torch.bool).scatter_(1, best, True).view(layers, heads, n)
