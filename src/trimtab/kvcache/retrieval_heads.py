"""Retrieval heads keep everything, all other heads a few first tokens and a window of the latest.

Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024, arXiv 2404.15574;
Xiao et al., DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, 2024,
arXiv 2410.10819.

Few heads bring back what stands far behind; the others look near. `trimtab inspect heads` (or `trimtab attach
retrieval_heads`) scores the query heads, a KV head's score is the largest of its group, and the best KV heads
keep every row. Each row of another head sees the `sinks` first rows and its own latest `window`, at their
positions in the text, and pages between them are freed after every step, of the prompt too.

Exact row by row, as if tokens came one by one: the result does not depend on chunking. Heads are chosen by
Wu's score, where DuoAttention learns a gate for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.paged import PAGE
from trimtab.kvcache.base import KVShape, Sequence
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class RetrievalHeadsOptions:
    keep: float = field(default=0.25, metadata={"help": "share of the KV heads that keep all, best first"})
    threshold: float | None = field(
        default=None, metadata={"help": "instead of `keep`: the KV heads of at least this score, 0 to 1"}
    )
    heads: tuple[str, ...] = field(
        default=(), metadata={"help": "instead of scores: these KV heads, as LAYER-HEAD, e.g. 3-0+5-1"}
    )
    sinks: int = field(default=16, metadata={"help": "first tokens that the other heads keep"})
    window: int = field(
        default=128, metadata={"help": "latest tokens that they see, the query's own included"}
    )
    attachment: str = field(
        default="auto",
        metadata={"help": "folder with the scores; auto = attachments/retrieval_heads beside the model"},
    )

    def __post_init__(self) -> None:
        def refuse(name: str, must: str) -> None:
            raise ConfigError(
                f"option {name!r} of retrieval_heads is {getattr(self, name)}; it must be {must}"
            )

        if not 0 <= self.keep <= 1:
            refuse("keep", "from 0 to 1")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            refuse("threshold", "from 0 to 1")
        if self.sinks < 0:
            refuse("sinks", "0 or more")
        if self.window < 1:
            refuse("window", "at least 1")
        if not all(re.fullmatch(r"\d+-\d+", head) for head in self.heads):
            refuse("heads", "of the form LAYER-HEAD+LAYER-HEAD, e.g. 3-0+5-1")
        if self.threshold is not None and self.heads:
            raise ConfigError("retrieval_heads chooses heads by 'threshold' or by 'heads'; give one of them")


@KV_CACHES.add(
    options=RetrievalHeadsOptions,
    card=Card(
        title="Retrieval heads",
        idea="The few heads that bring back what stands far behind keep everything; all others keep the "
        "first tokens and a window of the latest.",
        exactness="Exact row by row, at positions in the text. Heads are chosen by their retrieval score; "
        "DuoAttention learns gates. Lossy by design: the other heads cannot recall the middle.",
        cost="All rows of the heads kept and sinks + window rows of the others, while the prompt is read "
        "too; one native call a step, as for the full cache.",
        needs="An attachment with the heads' scores (`trimtab attach retrieval_heads`), or the heads by "
        "name; a model without a sliding window of its own.",
        avoid_when="The model has no clear retrieval heads, or texts are shorter than the window.",
        paper="Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024; Xiao et "
        "al., DuoAttention, 2024 (arXiv 2410.10819)",
        arxiv="2404.15574",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 1.9 MiB held "
        "(full 6.0), perplexity -2.1%, needle 40% (40%), 1.37x the speed of full.",
    ),
)
class RetrievalHeads(RowPolicy):
    stage = "alone"
    alone_because = "its heads look back over rows held in full; choose fewer heads or a smaller window"

    @staticmethod
    def problems(options: RetrievalHeadsOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = []
        if any(config.sliding_windows):
            found.append("the model's own sliding-window layers already forget; use cache=full")
        for layer, head in _pairs(options):
            if layer >= config.num_layers or head >= config.num_kv_heads:
                found.append(
                    f"there is no KV head {layer}-{head}: the model has {config.num_layers} layers of "
                    f"{config.num_kv_heads}, counted from 0"
                )
        return found

    def __init__(self, shape: KVShape, options: RetrievalHeadsOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        assert isinstance(self.rows, PerHeadRows)
        whole = self._whole_heads(shape, options)
        self.rows.look_back(torch.where(whole, 0, options.window).int(), options.sinks)

    @staticmethod
    def _whole_heads(shape: KVShape, options: RetrievalHeadsOptions) -> Tensor:
        """Bool [L, G]: the KV heads that keep everything."""
        size = shape.num_layers, shape.num_kv_heads
        whole = torch.zeros(size, dtype=torch.bool)
        if options.heads or (options.threshold is None and not options.keep):
            for layer, head in _pairs(options):
                whole[layer, head] = True
            return whole
        fitted = shape.attachments.get("retrieval_heads", options.attachment)
        scores = fitted.tensor("scores", (size[0], shape.num_heads), torch.float32)
        scores = scores.unflatten(1, (size[1], -1)).amax(2)
        if options.threshold is not None:
            return scores >= options.threshold
        count = max(1, round(options.keep * scores.numel()))
        whole.view(-1)[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
        return whole

    def choose(self, sequence: Sequence, count: int) -> None:
        assert isinstance(self.rows, PerHeadRows)
        unseen = sequence.length + 1 - self.options.window
        if unseen // PAGE > (unseen - count) // PAGE:  # a whole page more
            self.rows.drop_unseen(sequence.slot)


def _pairs(options: RetrievalHeadsOptions) -> list[tuple[int, int]]:
    """(layer, KV head) of each head named."""
    return [(int(layer), int(head)) for layer, head in (name.split("-") for name in options.heads)]
