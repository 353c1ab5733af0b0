"""The interface of a KV-cache policy.

A policy owns how the past is stored and how it is attended to; nothing else looks into a cache. One policy
object serves all requests of an engine. What happens in a step:

    reserve(sequence, n)      room for n new rows, or False (the scheduler then frees something)
    begin(rows)               once, when the step's rows are known
    attend(layer, q, k, v, rows)   for each layer: store k and v of the new rows, answer q
    arrange(rows, span, order)     only after a tree of drafts: bring the accepted path to the front
    commit(rows, kept)        kept[i] rows of span i become permanent, the rest are rolled back;
                              only now may a policy quantize, flush or evict

Rows written by `attend` are *tentative* until committed: drafts may be rejected. q and k arrive before rotary
embedding; the policy rotates (usually with `rows.cos, rows.sin`, which are those of the logical positions).
Attention over several places is a list of segments, each an `(out, logsumexp)`, joined by `kernels.merge`.

Physical length (rows held, per layer and head) and logical length (tokens of the text) are different
numbers: `sequence.length` is the logical one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PAGE, Asked, PagedRows
from trimtab.kernels.reference import TorchKernels
from trimtab.sizes import format_bytes

if TYPE_CHECKING:
    from trimtab.attachment import Attachments
    from trimtab.kernels.native import Library
    from trimtab.models.config import ModelConfig
    from trimtab.models.rotary import Rotary
    from trimtab.models.transformer import Model
    from trimtab.plan import MethodChoice, Plan


@dataclass(frozen=True)
class KVShape:
    """What a policy must know of the model and the engine."""

    num_layers: int
    num_heads: int  # query heads H
    num_kv_heads: int  # G
    head_dim: int  # d
    windows: tuple[int | None, ...]  # sliding window of each layer
    max_length: int  # most tokens of one text
    max_sequences: int
    max_step_tokens: int
    dtype: torch.dtype
    device: torch.device
    rotary: Rotary
    kernels: Library | TorchKernels
    attachments: Attachments
    sentence_ends: Callable[[], frozenset[int]] = frozenset  # ids of the tokens that end a sentence
    chain: tuple[MethodChoice, ...] = ()  # what the policy is combined with, in order of their stages

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def item_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """K and V of one token in one layer's one KV head, stored in full."""
        return 2 * self.head_dim * self.item_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers and heads, stored in full."""
        return self.num_layers * self.num_kv_heads * self.row_bytes


@dataclass(eq=False)
class Sequence:
    """One request's past, as its policy keeps it; policies derive their own."""

    slot: int  # row of the policy's tables
    prompt_length: int  # tokens up to here are the prompt; later ones were generated
    length: int = 0  # committed tokens of the text


@dataclass
class StepRows:
    """The new rows of one step: N rows, one span of consecutive rows a sequence."""

    sequences: list[Sequence]
    spans: Tensor  # int32 [spans, 3] on the CPU: slot, first row, one past the last
    positions: Tensor  # int64 [N], logical positions
    cos: Tensor  # float32 [N, d / 2] of the logical positions
    sin: Tensor
    mask: Tensor | None = None  # uint8, each span's [n, n] visibility among its new rows; None = causal
    bounds: list[tuple[int, int]] = field(default_factory=list)  # (first row, one past the last) per span
    tokens: Tensor | None = None  # int64 [N]

    @property
    def depth(self) -> Tensor | None:
        """In a tree of drafts: how many new tokens each row's path has, int32 [N]; None for chains."""
        if self.mask is None:
            return None
        held = [s.length for s, (a, b) in zip(self.sequences, self.bounds, strict=True) for _ in range(b - a)]
        return (self.positions + 1 - torch.tensor(held)).int()


class KVCache(ABC):
    """A cache policy. `options` is its options dataclass; the module's header has the protocol."""

    shares_prefix: ClassVar[bool] = False  # requests with a common beginning may share its rows
    chunks_generated: bool = True  # generated tokens may be recomputed several at a time
    endless: ClassVar[bool] = False  # texts longer than the model's context are fine
    wants_layer_input: bool = False  # call `layer_input` before each layer
    # What a combination takes it for: `keep` chooses rows, `store` says in which form, `place` says where.
    stage: ClassVar[Literal["alone", "keep", "store", "place"]] = "alone"
    alone_because: ClassVar[str] = ""  # why it combines with nothing
    single_rows: ClassVar[bool] = True  # in stage `store`: a packed row can be dropped alone, or why not:
    not_single_because: ClassVar[str] = ""

    def __init__(self, shape: KVShape, options: Any, memory_bytes: int) -> None:
        self.shape = shape
        self.options = options
        self.asked: Asked | None = None  # set by `begin` where a whole step is to leave its queries
        self.bytes_moved = 0  # bytes copied between places (device and host, packing, compaction)
        self.bytes_fetched = 0  # those of them that came from host memory to the device
        self._free_slots = list(range(shape.max_sequences - 1, -1, -1))

    @staticmethod
    def problems(options: Any, plan: Plan, config: ModelConfig) -> list[str]:
        """Every reason why this policy cannot run in `plan` on a model of `config`."""
        return []

    @classmethod
    def prepare(cls, model: Model, options: Any) -> Model:
        """The model to run: itself, or a copy of the same function that suits the policy."""
        return model

    @staticmethod
    def drops_settled(options: Any) -> bool:
        """Whether a policy that chooses rows does so again when they were settled (packed) already."""
        return False

    @staticmethod
    def packs(options: Any) -> Literal["", "at the end", "as it comes"]:
        """In stage `store`: when a prompt's rows are packed; empty where none ever is."""
        return ""

    # --- sequences and memory

    def open(self, prompt_length: int) -> Sequence:
        """Start a text of which the first `prompt_length` tokens are given."""
        return self.new_sequence(self._free_slots.pop(), prompt_length)

    def close(self, sequence: Sequence) -> None:
        """Give back all that a text holds."""
        self.release(sequence)
        self._free_slots.append(sequence.slot)

    @abstractmethod
    def new_sequence(self, slot: int, prompt_length: int) -> Sequence: ...

    @abstractmethod
    def release(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Make room for `count` rows beyond the committed ones; False, and nothing changed, without it."""

    def most_rows(self, sequence: Sequence, count: int) -> int:
        """How many of the next `count` rows may be computed in one step."""
        if self.chunks_generated:
            return count
        # Such a policy changes its state at the prompt's end and after every generated token.
        left = sequence.prompt_length - sequence.length
        return min(count, left) if left > 0 else 1

    def adopt_prefix(self, sequence: Sequence, tokens: Seq[int]) -> int:
        """Take over shared rows for a beginning of `tokens` (never all of them); how many tokens that was."""
        return 0

    def publish_prefix(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """Let others share the committed rows of this text."""

    # --- a step

    def begin(self, rows: StepRows) -> None:
        """Called once before the first layer."""

    def layer_input(self, layer: int, x: Tensor, rows: StepRows) -> None:
        """The residual stream [N, D] of the new rows that enters a layer, for those that want it."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        """Store the new rows' k, v [N, G, d] and answer q [N, H, d] with [N, H, d]; may change q and k."""

    def whole_step(self, rows: StepRows) -> PagedRows | CodedTables | None:
        """If all layers may run in one native call: where the rows lie. Else None."""
        return None

    @abstractmethod
    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        """Before the commit: make new rows `order` (ascending, counted within the span) the span's first,
        so that a path through a tree of drafts can be kept."""

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        """Keep the first `kept[i]` new rows of span i; the rest never happened."""
        for sequence, count in zip(rows.sequences, kept, strict=True):
            sequence.length += count

    # --- meters

    @property
    @abstractmethod
    def bytes_capacity(self) -> int:
        """The bound: no more than this is ever held."""

    @property
    @abstractmethod
    def bytes_held(self) -> int:
        """Bytes in use by texts that run, by the allocator's count (shared rows once)."""

    @property
    def bytes_cached(self) -> int:
        """Bytes kept only for reuse by later texts."""
        return 0

    @property
    def bytes_host(self) -> int:
        """Bytes in use in host memory by policies that keep a part there; other meters are the device's."""
        return 0

    @property
    def exhausted(self) -> str:
        """Which bound the last failed `reserve` met, for the message of a text that does not fit."""
        return f"kv_memory is {format_bytes(self.bytes_capacity)}"

    @abstractmethod
    def held_by(self, sequence: Sequence) -> int:
        """Bytes one text holds (shared rows counted in full)."""

    def host_held_by(self, sequence: Sequence) -> int:
        """Bytes one text holds in host memory."""
        return 0

    @abstractmethod
    def read_per_step(self, sequence: Sequence) -> int:
        """Bytes of cache that one decode step of this text reads."""

    def check(self) -> None:
        """Assert that free + used + cached = total and that the tables agree."""

    @property
    def fingerprint(self) -> str:
        """What decides the stored numbers, besides tokens and weights."""
        s = self.shape
        return (
            f"{type(self).__module__}:{self.options}:{s.dtype}:{s.num_layers}x{s.num_kv_heads}x{s.head_dim}"
        )


def move_rows(arena: Tensor, shape: KVShape, pages: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy rows `source` to places `target` (int64 [n]) of one sequence, in all layers and heads.

    `arena` is flat, of blocks that hold a page of K and V for every layer and head; `pages` names the
    sequence's block for each 16 rows.
    """
    units, d = shape.num_layers * shape.num_kv_heads, shape.head_dim
    blocks = arena.view(-1, units, 2, PAGE * d)
    keys, values = blocks[:, :, 0].unflatten(-1, (d, PAGE)), blocks[:, :, 1].unflatten(-1, (PAGE, d))
    source, target, pages = (x.to(arena.device) for x in (source, target, pages.long()))
    taken, put = pages[source // PAGE], pages[target // PAGE]
    keys[put, :, :, target % PAGE] = keys[taken, :, :, source % PAGE]
    values[put, :, target % PAGE] = values[taken, :, source % PAGE]
