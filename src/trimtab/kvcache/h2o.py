"""H2O: keep the recent tokens and the heavy hitters, the tokens that received most attention so far.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference, 2023, arXiv 2306.14048.

Each KV head keeps a running score for every row: the attention probability it received, summed over all
queries so far (and over the query heads of the group). At the prompt's end, and after every generated
token, each head drops its lowest-scored rows outside the recent window until `budget` rows are left; a
dropped row's score goes with it. Rows keep their logical positions.

Exact as published for the prompt in full and decoding token by token; half the budget recent and half heavy
is the split papers quote (reconstructed, hence an option). Early tokens collect more sums; the published
score does not correct for that and neither does this one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kvcache.base import KVShape, Sequence, StepRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class H2OOptions:
    budget: int = field(default=256, metadata={"help": "rows a head keeps, recent ones included"})
    recent: float = field(default=0.5, metadata={"help": "share of the budget for the latest tokens"})

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise ConfigError(f"option 'budget' of h2o is {self.budget}; it must be at least 2")
        if not 0 < self.recent <= 1:
            raise ConfigError(f"option 'recent' of h2o is {self.recent}; it must be above 0 and at most 1")

    @property
    def recent_rows(self) -> int:
        return max(1, round(self.budget * self.recent))


_NOTES = 8  # bytes a row: its score and its position


@dataclass(eq=False)
class H2OSequence(Sequence):
    score: Tensor = field(default_factory=lambda: torch.empty(0))  # float32 [L, G, rows]
    position: Tensor = field(default_factory=lambda: torch.empty(0))  # int32 [L, G, rows], in the text


@KV_CACHES.add(
    options=H2OOptions,
    card=Card(
        title="H2O",
        idea="Each head keeps its most attended tokens and the latest ones, and frees the rest as it goes.",
        exactness="As published; the equal split between recent and heavy rows is reconstructed.",
        cost="`budget` rows a head after the prompt plus 8 bytes a row of bookkeeping; the scores of every "
        "new token are computed twice, for the prompt too.",
        needs="A model without a sliding window of its own; the whole prompt held once, until its end.",
        avoid_when="A question at the end decides what matters (SnapKV sees it), or prompts barely fit.",
        paper="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, 2023",
        arxiv="2306.14048",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC, texts of 640 tokens: "
        "792 KiB held (full 1.9 MiB), perplexity +2.18, needle 50% (83%), 1.90 ms a token (0.25).",
    ),
)
class H2O(RowPolicy):
    chunks_generated = False
    notes_bytes = _NOTES

    @staticmethod
    def problems(options: H2OOptions, plan: Plan, config: ModelConfig) -> list[str]:
        if any(config.sliding_windows):
            return ["the model's own sliding-window layers already forget; use cache=full"]
        return []

    @staticmethod
    def drops_settled(options: H2OOptions) -> bool:
        return True

    def __init__(self, shape: KVShape, options: H2OOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self._seen: list[tuple[Tensor, Tensor]] = []  # this step's (rotated q, logsumexp) by layer

    def make_sequence(self, slot: int, prompt_length: int) -> H2OSequence:
        shape = (self.shape.num_layers, self.shape.num_kv_heads, 0)
        return H2OSequence(
            slot, prompt_length, score=torch.zeros(shape), position=torch.zeros(shape, dtype=torch.int32)
        )

    def reserve(self, sequence: Sequence, count: int) -> bool:
        return self.rows.reserve(sequence.slot, count)

    def begin(self, rows: StepRows) -> None:
        self._seen = []

    def notes(self, rows: StepRows) -> bool:
        return True

    def note(self, layer: int, q: Tensor, lse: Tensor, rows: StepRows) -> None:
        self._seen.append((q, lse))

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        self.rows.arrange(rows.sequences[span].slot, list(order))
        first = rows.bounds[span][0]
        source = torch.tensor(order, device=self.shape.device) + first
        for q, lse in self._seen:  # the scores at the commit are those of the kept queries
            q[first : first + len(order)] = q[source]
            lse[first : first + len(order)] = lse[source]

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        spans = rows.spans.clone()
        spans[:, 2] = spans[:, 1] + torch.tensor(kept, dtype=torch.int32)
        scores = self._received(rows, spans)
        self._scores = {sequence.slot: scores[:, i] for i, sequence in enumerate(rows.sequences)}
        super().commit(rows, kept)

    def choose(self, sequence: Sequence, count: int) -> None:
        assert isinstance(sequence, H2OSequence)
        self._append(sequence, self._scores[sequence.slot], count)
        if sequence.length >= sequence.prompt_length:
            self._evict(sequence)

    def _received(self, rows: StepRows, spans: Tensor) -> Tensor:
        """Scores of every row, the kept new queries' attention added: float32 [L, spans, G, rows].

        Added query by query to what there was, so that chunks give the bits of the whole. Kept rows follow
        one another in the text, so among them no mask is needed.
        """
        s = self.shape
        slots = spans[:, 0].long()
        longest = int((self.rows.length[slots].amax((1, 2)) + spans[:, 2] - spans[:, 1]).max())
        sums = torch.zeros(s.num_layers, len(spans), s.num_kv_heads, longest)
        for i, sequence in enumerate(rows.sequences):
            assert isinstance(sequence, H2OSequence)
            sums[:, i, :, : sequence.score.shape[2]] = sequence.score
        sums = sums.to(s.device)
        for layer, (q, lse) in enumerate(self._seen):
            self.rows.column_sums(layer, q, spans, sums[layer], lse)
        return sums.cpu()

    def _append(self, sequence: H2OSequence, score: Tensor, count: int) -> None:
        total = sequence.score.shape[2] + count
        new = torch.arange(sequence.length - count, sequence.length, dtype=torch.int32)
        sequence.score = score[..., :total].clone()
        sequence.position = torch.cat([sequence.position, new.expand(*score.shape[:2], count)], 2)

    def _evict(self, sequence: H2OSequence) -> None:
        excess = sequence.score.shape[2] - self.options.budget
        if excess <= 0:
            return
        recent = sequence.position >= sequence.length - self.options.recent_rows
        rank = sequence.score.masked_fill(recent, torch.inf)
        if excess == 1:  # every generated token: one row out, the newest takes its place
            victim = rank.argmin(2, keepdim=True)
            self.bytes_moved += self.rows.replace(sequence.slot, victim[..., 0])
            for name in ("score", "position"):
                values = getattr(sequence, name)
                values.scatter_(2, victim, values[..., -1:].clone())
                setattr(sequence, name, values[..., :-1])
            return
        order = rank.argsort(dim=2, descending=True, stable=True)
        index = order[..., : self.options.budget].sort(2).values
        self.bytes_moved += self.rows.keep(sequence.slot, index)
        sequence.score = sequence.score.gather(2, index)
        sequence.position = sequence.position.gather(2, index)

    def beside(self, sequence: Sequence) -> int:
        assert isinstance(sequence, H2OSequence)
        return sequence.score.numel() * _NOTES

    def read_per_step(self, sequence: Sequence) -> int:
        # Keys are read twice: for the output and for the scores.
        return self.rows.read(sequence.slot) * 3 // 2
