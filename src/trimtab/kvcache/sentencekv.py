"""SentenceKV: rows in host memory, found again sentence by sentence.

Zhu et al., Efficient LLM Inference via Sentence-Level Semantic KV Caching, 2025, arXiv 2504.00970.

The prompt is attended exactly. At its end each head keeps what the last queries look at (as SnapKV does, with
max-pooling) plus the first and the last tokens, `semantic_factor * budget` rows in all; they go to the host.
On the device stays one vector a sentence and head: the mean of its kept keys. While a sentence is generated
the mean of its queries so far asks those vectors; sentences are taken by falling similarity until, with the
`first` and the `last` tokens, `budget` rows are filled. In the step of a sentence's first token everything
kept is attended to. Every generated token is kept; when one ends a sentence its vector is added.

As published, with retrieval at every step. Ours: a group's query heads ask together; rows fetched for one
step serve the next, so that only new ones cross the bus; a sentence is cut at `max_sentence` tokens (texts
without punctuation); rows of the unfinished sentence that left the last tokens come before all others; drafts
share the retrieval of the row before them. What is read from the host at a sentence's first token is counted
as fetched and lives for one layer's attention. `budget` that holds the whole text equals full attention.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kernels.reference import brought
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows
from trimtab.kvcache.paging.host import HOST_MEMORY_HELP, check_host_memory, host_arena, some_spans
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.kvcache.paging.votes import remember, votes
from trimtab.registry import KV_CACHES, Card
from trimtab.sizes import format_bytes

if TYPE_CHECKING:
    from trimtab.kernels.coded import CodedTables
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan

_NOTES = 4  # bytes a row: its sentence


@dataclass(frozen=True, slots=True)
class SentenceKVOptions:
    budget: int = field(default=256, metadata={"help": "rows a head attends to, first and last included"})
    semantic_factor: float = field(default=3.0, metadata={"help": "rows kept of the prompt, in budgets"})
    first: int = field(default=32, metadata={"help": "first tokens, always attended to"})
    last: int = field(default=32, metadata={"help": "latest tokens, always attended to"})
    window: int = field(default=32, metadata={"help": "last prompt tokens whose queries vote"})
    kernel: int = field(default=7, metadata={"help": "width of the max-pooling of the votes, odd"})
    max_sentence: int = field(default=128, metadata={"help": "tokens after which a sentence is cut"})
    host_memory: str | None = field(default=None, metadata={"help": HOST_MEMORY_HELP})

    def __post_init__(self) -> None:
        for name, least in (("first", 0), ("last", 1), ("window", 1), ("max_sentence", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ConfigError(f"option {name!r} of sentencekv is {value}; it must be at least {least}")
        if self.budget <= self.first + self.last:
            raise ConfigError(
                f"option 'budget' of sentencekv is {self.budget}, but first + last are already "
                f"{self.first + self.last} rows; make it larger, or those smaller"
            )
        if self.kept < max(self.budget, self.first + max(self.last, self.window)):
            raise ConfigError(
                f"option 'semantic_factor' of sentencekv is {self.semantic_factor}, which keeps {self.kept} "
                f"rows of the prompt; it must keep at least the budget of {self.budget} and first + window"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(
                f"option 'kernel' of sentencekv is {self.kernel}; it must be odd and at least 1"
            )
        check_host_memory(self.host_memory, "sentencekv")

    @property
    def kept(self) -> int:
        return round(self.semantic_factor * self.budget)


@dataclass(eq=False)
class SentenceSequence(Sequence):
    queries: Tensor | None = None  # float32 [L, window, H, d] of the prompt's last tokens, until its end
    of_token: list[int] = field(default_factory=list)  # sentence of each token of the prompt, until its end
    sentence: int = 0  # number of the sentence under way
    size: int = 0  # its tokens so far
    # Once the prompt is complete:
    of_row: Tensor | None = None  # int32 [L, G, rows in host memory], their sentences
    means: Tensor | None = None  # float32 [L, G, sentences, d], of the kept keys
    asked: Tensor | None = None  # float32 [2, L, G, d]: sums of the queries and the keys of the sentence
    held: list[Tensor] = field(default_factory=list)  # a layer: int64 [G, n], ascending: rows on the device
    promised: int = 0  # device bytes that the next commit may need

    @property
    def placed(self) -> bool:
        return self.of_row is not None


@KV_CACHES.add(
    options=SentenceKVOptions,
    card=Card(
        title="SentenceKV",
        idea="Keep rows in host memory and one vector a sentence on the device; bring back the sentences "
        "that the one being written asks for.",
        exactness="As published, with retrieval at every step. Lossy; a budget that holds the whole text is "
        "lossless. A group's query heads ask together; long sentences are cut.",
        cost="`budget` rows a head and a vector a sentence on the device, the prompt's `semantic_factor` "
        "budgets and all generated rows in host memory; each step moves the rows not yet there, and a "
        "sentence's first token all of them.",
        needs="A model without a sliding window of its own; host memory; a tokenizer whose tokens end "
        "sentences (else every sentence is `max_sentence` tokens).",
        avoid_when="Texts have no sentences (tables, code), or many facts must be found at once.",
        paper="Zhu et al., Efficient LLM Inference via Sentence-Level Semantic KV Caching, 2025",
        arxiv="2504.00970",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 1.2 MiB held "
        "(full 6.0), perplexity +0.3%, needle 40% (40%), 0.10x the speed of full.",
    ),
)
class SentenceKV(RowPolicy):
    stage = "alone"
    alone_because = "it chooses rows by itself and its device holds a changing copy of them"
    chunks_generated = False

    @staticmethod
    def problems(options: SentenceKVOptions, plan: Plan, config: ModelConfig) -> list[str]:
        if any(config.sliding_windows):
            return ["the model's own sliding-window layers already forget; use cache=full"]
        return []

    def __init__(self, shape: KVShape, options: SentenceKVOptions, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        assert isinstance(self.rows, PerHeadRows)
        self.device = self.rows
        page = PAGE * shape.row_bytes
        row = shape.row_bytes + _NOTES
        arena = host_arena(shape, [page], row, options.host_memory, "sentencekv")
        self.host = PerHeadRows(shape, arena.total, _NOTES, arena)
        self.ends = shape.sentence_ends()
        units = shape.num_layers * shape.num_kv_heads * shape.head_dim
        self._mean_bytes = units * 4
        self._lacking: str | None = None
        self._step: dict[int, Tensor] = {}  # layer: float32 [2, N, G, d], the step's queries and keys
        self._tokens: list[int] = []

    def make_sequence(self, slot: int, prompt_length: int) -> SentenceSequence:
        s, o = self.shape, self.options
        self.host.open(slot)
        queries = None
        if prompt_length > o.kept:
            queries = torch.empty(s.num_layers, o.window, s.num_heads, s.head_dim, device=s.device)
        return SentenceSequence(slot, prompt_length, queries=queries)

    def release(self, sequence: Sequence) -> None:
        self.host.close(sequence.slot)
        super().release(sequence)

    # --- memory

    def reserve(self, sequence: Sequence, count: int) -> bool:
        assert isinstance(sequence, SentenceSequence)
        o, slot, end = self.options, sequence.slot, sequence.length + count
        before = sequence.promised
        if sequence.placed:
            # The retrieved rows, of which the row that asks is the last, and drafts behind it.
            kept = int(self.host.length[slot, 0, 0])
            device = min(kept + 1, o.budget) - 1 + count - int(self.device.length[slot, 0, 0])
            host = count
            sequence.promised = count * self._mean_bytes
        else:
            device, host = count, min(end, o.kept)
            # Vectors of the sentences, at most one a token, less the rows that are given back for them.
            back = max(0, end - o.first - o.last - 2 * PAGE) * self.shape.token_bytes
            most = (sequence.sentence + count + 3) * self._mean_bytes
            sequence.promised = max(0, most - back)
        beside = self._beside + sum(s.promised for s in self._open.values())  # type: ignore[attr-defined]
        self._lacking = None
        fits = self.device.bytes_used + beside <= self.device.bytes_capacity
        if not self.host.reserve(slot, host):
            self._lacking = f"{self.host.arena.setting} is {format_bytes(self.host.arena.total)}"
        elif fits and self.device.reserve(slot, device, beside):
            return True
        else:
            self.host.give_back(slot)
        sequence.promised = before
        return False

    @property
    def exhausted(self) -> str:
        return self._lacking or super().exhausted

    # --- a step

    def begin(self, rows: StepRows) -> None:
        super().begin(rows)
        self._tokens = [] if rows.tokens is None else rows.tokens.tolist()

    def asks(self, rows: StepRows) -> bool:
        return any(s.queries is not None for s in rows.sequences)  # type: ignore[attr-defined]

    def whole_step(self, rows: StepRows) -> PagedRows | CodedTables | None:
        """Steps of prompts alone."""
        if any(s.placed for s in rows.sequences):  # type: ignore[attr-defined]
            return None
        return super().whole_step(rows)

    def _retrieves(self, sequence: Sequence) -> bool:
        """Whether the device holds what the next row attends to; else everything is read from the host."""
        assert isinstance(sequence, SentenceSequence)
        total = int(self.host.length[sequence.slot, 0, 0]) + 1
        return sequence.placed and (sequence.size > 0 or total <= self.options.budget)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels, s = self.shape.kernels, self.shape
        kernels.rotate(q, rows.cos, rows.sin)
        kernels.rotate(k, rows.cos, rows.sin)
        # A sum over the group in a fixed order; that it is no mean changes no ranking.
        asked = sum(q.unflatten(1, (s.num_kv_heads, -1)).float().unbind(2), torch.zeros(()).to(q.device))
        self._step[layer] = torch.stack([asked, k.float()])
        for sequence, (begin, _) in zip(rows.sequences, rows.bounds, strict=True):
            if self._retrieves(sequence):
                assert isinstance(sequence, SentenceSequence) and sequence.asked is not None
                self._bring(
                    sequence, layer, self._choose(sequence, layer, sequence.asked[0, layer] + asked[begin])
                )
        placed, _ = some_spans(rows, lambda one: one.placed)  # type: ignore[attr-defined]
        if len(placed):
            kernels.write(self.host.call(layer, placed), k, v)
        parts = []
        far = {one.slot for one in rows.sequences if one.placed and not self._retrieves(one)}  # type: ignore[attr-defined]
        for store in (self.device, self.host):
            spans, mask = some_spans(rows, lambda one, host=store is self.host: (one.slot in far) == host)
            if len(spans):
                call: PagedRows = store.call(layer, spans, mask=mask, depth=rows.depth)
                if store is self.device:
                    kernels.write(call, k, v)
                else:
                    held = sum(int(store.length[slot, layer].sum()) for slot in spans[:, 0].tolist())
                    self.device.fetched += held * s.row_bytes
                parts.append(kernels.attend(call, q))
        if self.asked is not None:
            self.asked.queries[layer] = q
        return kernels.merge(parts)

    def _choose(self, sequence: SentenceSequence, layer: int, asked: Tensor) -> Tensor:
        """Committed rows int64 [G, n], ascending, that a row asking with `asked` [G, d] attends to."""
        o, heads = self.options, self.shape.num_kv_heads
        assert sequence.means is not None and sequence.of_row is not None
        total = int(self.host.length[sequence.slot, 0, 0])
        every = torch.arange(total).expand(heads, total)
        if total < o.budget:
            return every
        similar = (sequence.means[layer] * asked[:, None]).sum(-1).cpu()
        rank = similar.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        rank = torch.cat([rank, torch.full((heads, 1), -1)], 1)  # the sentence under way is the nearest
        recent = total + 1 - o.last  # the asking row is the latest itself
        middle = rank.gather(1, sequence.of_row[layer, :, o.first : recent].long())
        taken = middle.argsort(dim=1, stable=True)[:, : o.budget - o.first - o.last].sort(1).values
        return torch.cat([every[:, : o.first], taken + o.first, every[:, recent:]], 1)

    def _bring(self, sequence: SentenceSequence, layer: int, rows: Tensor) -> None:
        """Make the device hold rows [G, n] of one layer, in that order; fetch those it has not."""
        slot, held, only = sequence.slot, sequence.held[layer], slice(layer, layer + 1)
        n = rows.shape[1]
        if not torch.equal(held, rows):
            at = torch.searchsorted(held, rows.contiguous()).clamp(max=held.shape[1] - 1)
            lacking = held.gather(1, at) != rows
            k, v = (x[0] for x in self.device.gather(slot, at[None], only))
            found = self.host.pick(slot, layer, rows, lacking)
            k[lacking], v[lacking] = (brought(x, k.device) for x in found)
            self.device.scatter(slot, torch.arange(n).expand_as(rows)[None], k[None], v[None], only)
            self.device.fetched += int(lacking.sum()) * self.shape.row_bytes
            sequence.held[layer] = rows
        self.device.length[slot, layer] = n

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        sequence, first = rows.sequences[span], rows.bounds[span][0]
        assert isinstance(sequence, SentenceSequence)
        if not sequence.placed or self._retrieves(sequence):
            self.device.arrange(sequence.slot, order)
        if sequence.placed:
            self.host.arrange(sequence.slot, order)
        source = [first + i for i in order]
        steps = list(self._step.values())
        for seen in steps if self.asked is None else [*steps, self.asked.queries]:
            seen[:, first : first + len(order)] = seen[:, source]
        if self._tokens:
            self._tokens[first : first + len(order)] = [self._tokens[i] for i in source]

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        for sequence, count, (first, _) in zip(rows.sequences, kept, rows.bounds, strict=True):
            assert isinstance(sequence, SentenceSequence)
            if sequence.placed:
                self._grow(sequence, first, count)
                continue
            self.device.grow(sequence.slot, count)
            if sequence.queries is not None:
                assert self.asked is not None
                remember(sequence.queries, sequence, self.asked.queries[:, first : first + count])
            for row in range(first, first + count):
                sequence.of_token.append(sequence.sentence)
                self._count_token(sequence, row)
        KVCache.commit(self, rows, kept)
        for sequence in rows.sequences:
            assert isinstance(sequence, SentenceSequence)
            if not sequence.placed and sequence.length >= sequence.prompt_length:
                self._place(sequence)
        self.bytes_fetched += self.device.fetched
        self.bytes_moved += self.device.fetched
        self.device.fetched = 0

    def _count_token(self, sequence: SentenceSequence, row: int) -> bool:
        """Count row `row` of the step to its sentence; whether that ends here."""
        sequence.size += 1
        ended = bool(self._tokens) and self._tokens[row] in self.ends
        if ended or sequence.size >= self.options.max_sentence:
            sequence.sentence, sequence.size = sequence.sentence + 1, 0
            return True
        return False

    def _grow(self, sequence: SentenceSequence, first: int, count: int) -> None:
        """Take `count` generated rows, from row `first` of the step on, into the text."""
        assert sequence.of_row is not None and sequence.asked is not None and sequence.means is not None
        slot, total = sequence.slot, int(self.host.length[sequence.slot, 0, 0])
        heads = sequence.of_row.shape[:2]
        if self._retrieves(sequence):
            self.device.grow(slot, count)
            new = torch.arange(total, total + count).expand(heads[1], count)
            sequence.held = [torch.cat([held, new], 1) for held in sequence.held]
        self.host.grow(slot, count)
        numbers = []
        for row in range(first, first + count):
            numbers.append(sequence.sentence)
            for layer, seen in self._step.items():
                sequence.asked[:, layer] += seen[:, row]
            size = sequence.size + 1
            if self._count_token(sequence, row):
                sequence.means = torch.cat([sequence.means, sequence.asked[1, :, :, None] / size], 2)
                sequence.asked.zero_()
        new = torch.tensor(numbers, dtype=torch.int32).expand(*heads, count)
        sequence.of_row = torch.cat([sequence.of_row, new], 2)

    def _place(self, sequence: SentenceSequence) -> None:
        """The prompt is complete: move what is kept of it to the host."""
        o, slot, total = self.options, sequence.slot, sequence.prompt_length
        every = torch.arange(total).expand(*self.device.length.shape[1:], total)
        index = every
        if sequence.queries is not None:
            received = votes(self.device, sequence.slot, sequence.queries)[..., o.first : total - o.window]
            smooth = F.max_pool1d(received, o.kernel, stride=1, padding=o.kernel // 2)
            order = smooth.argsort(dim=2, descending=True, stable=True)[..., : o.kept - o.first - o.window]
            taken = order.sort(2).values + o.first
            index = torch.cat([every[..., : o.first], taken, every[..., total - o.window :]], 2)
        n = index.shape[2]
        k, v = self.device.gather(slot, index)
        self.host.scatter(
            slot, every[..., :n], k.to(self.host.arena.bytes.device), v.to(self.host.arena.bytes.device)
        )
        self.host.length[slot] = n
        self.bytes_moved += 2 * k.numel() * k.element_size()
        sequence.sentence += sequence.size > 0  # the prompt's end ends its last sentence
        sequence.size = 0
        sequence.of_row = torch.tensor(sequence.of_token, dtype=torch.int32)[index]
        where = sequence.of_row.long().to(k.device)[..., None]
        sums = torch.zeros(*where.shape[:2], sequence.sentence, k.shape[-1], device=k.device)
        counts = sums[..., :1].scatter_add(2, where, torch.ones_like(where, dtype=sums.dtype))
        sums.scatter_add_(2, where.expand_as(k), k.float())
        sequence.means = sums / counts.clamp(min=1)
        sequence.asked = torch.zeros(2, *k.shape[:2], k.shape[-1], device=k.device)
        near = torch.tensor([i for i in range(n) if i < o.first or i >= n - o.last])
        self.bytes_moved += self.device.keep(slot, index[..., near])
        sequence.held = list(every[..., near].unbind(0))
        sequence.queries, sequence.of_token, sequence.promised = None, [], 0

    # --- meters

    def beside(self, sequence: Sequence) -> int:
        assert isinstance(sequence, SentenceSequence)
        tensors = (sequence.queries, sequence.means, sequence.asked)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def bytes_host(self) -> int:
        return self.host.bytes_used + sum(self._notes(s) for s in self._open.values())

    @staticmethod
    def _notes(sequence: Sequence) -> int:
        assert isinstance(sequence, SentenceSequence)
        return 0 if sequence.of_row is None else sequence.of_row.nbytes

    def host_held_by(self, sequence: Sequence) -> int:
        return self.host.held(sequence.slot) + self._notes(sequence)

    def read_per_step(self, sequence: Sequence) -> int:
        """Rows attended to and the sentences' vectors."""
        assert isinstance(sequence, SentenceSequence)
        if sequence.means is None:
            return self.device.read(sequence.slot)
        kept = int(self.host.length[sequence.slot, 0, 0])
        return min(kept, self.options.budget) * self.shape.token_bytes + sequence.means.nbytes

    def check(self) -> None:
        self.device.check()
        self.host.check()
