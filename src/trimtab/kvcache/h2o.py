"""H2O: keep the recent tokens and the heavy hitters, the tokens that received most attention so far.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference, 2023, arXiv 2306.14048.

Each KV head keeps a running score for every row: the attention probability it received, summed over all
queries so far (and over the query heads of the group). At the prompt's end, and after every generated
token, each head drops its lowest-scored rows outside the recent window until `budget` rows are left; a
dropped row's score goes with it. Rows keep their logical positions.

Exact as published for the prompt in full and decoding token by token; half the budget recent and half heavy
is the split papers quote (reconstructed, hence an option). With `chunk` rows are dropped inside the prompt
too. Early tokens collect more sums; the published score does not correct for that and neither does this one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.paged import PAGE, Asked
from trimtab.kvcache.base import KVShape, Sequence, StepRows
from trimtab.kvcache.paging.budget import BudgetOptions
from trimtab.kvcache.paging.evicting import EvictedSequence, Evicting
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.registry import KV_CACHES, Card

_NOTES = 8  # bytes a row: its score and its position
_ALL = 1 << 31  # rows to keep where none are to be dropped


@dataclass(frozen=True, slots=True)
class H2OOptions(BudgetOptions):
    recent: float = field(default=0.5, metadata={"help": "share of the budget for the latest tokens"})

    def __post_init__(self) -> None:
        self.check("h2o", 1, "the latest token")
        if not 0 < self.recent <= 1:
            raise ConfigError(f"option 'recent' of h2o is {self.recent}; it must be above 0 and at most 1")


@dataclass(eq=False)
class H2OSequence(EvictedSequence):
    """`notes`: each row's score, float32 [L, G, capacity], and its position in the text, int32."""

    @property
    def held(self) -> int:
        """Rows of each head."""
        return self.length - self.gone

    @property
    def capacity(self) -> int:
        return self.notes[0].shape[2]


@KV_CACHES.add(
    options=H2OOptions,
    card=Card(
        title="H2O",
        idea="Each head keeps its most attended tokens and the latest ones, and frees the rest as it goes.",
        exactness="As published; the equal split between recent and heavy rows is reconstructed.",
        cost="`budget` rows a head after the prompt plus 8 bytes a row of bookkeeping; the scores of every "
        "new token are computed twice, for the prompt too.",
        needs="A model without a sliding window of its own; without `chunk` the whole prompt held once, "
        "until its end.",
        avoid_when="A question at the end decides what matters (SnapKV sees it).",
        paper="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, 2023",
        arxiv="2306.14048",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: budget=25%: "
        "1.4 MiB held (full 6.0), perplexity -0.9%, needle 20% (40%), 1.07x the speed of full.",
    ),
)
class H2O(Evicting):
    options: H2OOptions
    notes_bytes = _NOTES
    interval = 1
    protected = 1

    @staticmethod
    def drops_settled(options: H2OOptions) -> bool:
        return True

    def __init__(self, shape: KVShape, options: H2OOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self._kernel = getattr(shape.kernels, "heavy", None) if type(self.rows) is PerHeadRows else None

    def make_sequence(self, slot: int, prompt_length: int) -> H2OSequence:
        s = self.shape
        empty = torch.empty(s.num_layers, s.num_kv_heads, 0, device=s.device)
        return H2OSequence(slot, prompt_length, notes=(empty, empty.int()))

    def reserve(self, sequence: Sequence, count: int) -> bool:
        assert isinstance(sequence, H2OSequence)
        if not (self.rows.fits(sequence.slot, count) or self.rows.reserve(sequence.slot, count)):
            return False
        self._resize(sequence, sequence.held + count)
        return True

    def _resize(self, sequence: H2OSequence, rows: int) -> None:
        """Notes for at least `rows` rows of each head, in the steps in which pages are given."""
        if (more := -(-rows // PAGE) * PAGE - sequence.capacity) > 0:
            sequence.notes = tuple(F.pad(note, (0, more)) for note in sequence.notes)

    def asks(self, rows: StepRows) -> bool:
        return True

    # --- a commit: what every row received is added, then the lowest go

    def take_all(self, rows: StepRows, kept: Seq[int], asked: Asked) -> None:
        spans = rows.spans.clone()
        spans[:, 2] = spans[:, 1] + torch.tensor(kept, dtype=torch.int32)
        each = []
        for i, (sequence, count) in enumerate(zip(rows.sequences, kept, strict=True)):
            assert isinstance(sequence, H2OSequence)
            if self._kernel is None:
                self._add(sequence, asked, spans[i : i + 1], count)
                continue
            score, position = sequence.notes
            length, keep = sequence.length + count, _ALL
            if length >= sequence.due and self._few(sequence, length):
                keep = self._budget(sequence, length)
            places = score.data_ptr(), position.data_ptr(), sequence.capacity
            each.append((*places, sequence.length, keep, length - self._recent(keep)))
        if self._kernel is not None:
            assert isinstance(self.rows, PerHeadRows)
            self._kernel(self.rows.call(0, spans), asked.queries, asked.lse, torch.tensor(each))

    def _add(self, sequence: H2OSequence, asked: Asked, span: Tensor, count: int) -> None:
        """What the kernel does, but for dropping, on any rows. Query by query, so that chunks give the bits
        of the whole; kept rows follow one another in the text, so among them no mask is needed."""
        score, position = sequence.notes
        new = slice(sequence.held, sequence.held + count)
        score[..., new] = 0
        position[..., new] = torch.arange(sequence.length, sequence.length + count)
        for layer, (q, lse) in enumerate(zip(asked.queries, asked.lse, strict=True)):
            self.rows.column_sums(layer, q, span, score[layer][None], lse)

    def _few(self, sequence: H2OSequence, length: int) -> bool:
        """Whether at this length the kernel drops the rows one by one: few go, as after a generated token."""
        return length - sequence.gone - self._budget(sequence, length) <= PAGE

    def _recent(self, budget: int) -> int:
        return max(1, round(budget * self.options.recent))

    def drop(self, sequence: H2OSequence, keep: int) -> None:
        excess = sequence.held - keep
        if self._kernel is not None and self._few(sequence, sequence.length):
            assert isinstance(self.rows, PerHeadRows)
            self.rows.cut(sequence.slot, excess)
            if sequence.capacity - keep > PAGE:  # as many as rows have pages
                sequence.notes = tuple(n[..., : keep // PAGE * PAGE + PAGE].clone() for n in sequence.notes)
            self.bytes_moved += 2 * excess * self.shape.token_bytes
            return
        score, position = (note[..., : sequence.held] for note in sequence.notes)
        rank = score.masked_fill(position >= sequence.length - self._recent(keep), torch.inf)
        if excess == 1:
            victim = rank.argmin(2, keepdim=True)
            self.bytes_moved += self.rows.replace(sequence.slot, victim[..., 0].cpu())
            for note in (score, position):
                note.scatter_(2, victim, note[..., -1:].clone())
            return
        index = rank.argsort(dim=2, descending=True, stable=True)[..., :keep].sort(2).values
        self.bytes_moved += self.rows.keep(sequence.slot, index.cpu())
        sequence.notes = score.gather(2, index), position.gather(2, index)
        self._resize(sequence, keep)

    def read_per_step(self, sequence: Sequence) -> int:
        # Keys are read twice: for the output and for the scores.
        return self.rows.read(sequence.slot) * 3 // 2
