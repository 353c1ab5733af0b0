"""Rows coded for all KV heads of a layer together, and what the policies on them have in common.

The whole prompt is attended in full precision and coded at its end; afterwards each token is coded when it
is committed, so that tentative rows can be dropped. A few tokens a layer may be kept in full for good. Keys
are stored before rotary embedding and turned when they are read. All heads of a layer share codes and
constants, so rows cannot be dropped head by head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trimtab.kernels import reference_per_layer
from trimtab.kernels.paged import PAGE
from trimtab.kernels.per_layer import Codec, PerLayerTables
from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVCache, KVShape, Sequence, StepRows
from trimtab.kvcache.paging.arena import Arena, PagePool

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig


class PerLayerRows:
    """Blocks of 16 tokens of all layers, in full and coded, and single rows of a layer that stay in full.

    `kept_most`: how many tokens of a layer may be kept in full; `notes_bytes`: what the policy holds beside
    a text (`note`). `tables` is what the kernels read; `ops` are the kernels.
    """

    def __init__(
        self,
        shape: KVShape,
        memory_bytes: int,
        codec: Codec | None,
        *,
        kept_most: int = 0,
        notes_bytes: int = 0,
        rope_on_read: bool = True,
        order: Tensor | None = None,
        hadamard: int = 1,
        folded: bool = False,
    ) -> None:
        self.shape = shape
        slots, layers, most = shape.max_sequences, shape.num_layers, max(1, kept_most)
        blocks = (shape.max_length + shape.max_step_tokens) // PAGE + 1

        def counts(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32)

        self.tables = t = PerLayerTables(
            arena=torch.empty(0),
            full=counts(slots, blocks),
            coded=counts(slots, blocks),
            kept_at=counts(slots, layers, most),
            kept_page=counts(slots, layers, most),
            kept_count=counts(slots, layers),
            start=counts(slots),
            done=counts(slots),
            spans=counts(0, 3),
            rows_like=torch.empty(0, dtype=shape.dtype),
            num_layers=layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            codec=codec,
            order=order,
            hadamard=hadamard,
            folded=folded,
        )
        sizes = {"full": t.full_block, "coded": t.coded_block, "kept": t.row_bytes, "notes": notes_bytes}
        if codec is None or not kept_most:
            del sizes["kept"]
        sizes = {name: size for name, size in sizes.items() if size}
        self.arena = Arena(memory_bytes, list(sizes.values()), shape.device)
        self.pools = {name: PagePool(self.arena, size) for name, size in sizes.items()}
        t.arena = self.arena.bytes
        self.kept_most = kept_most
        self._rope_on_read = rope_on_read
        self._held: dict[int, dict[str, list[int]]] = {}
        self._dropped: dict[int, int] = {}  # blocks in full that were given back
        self.ops: Any = reference_per_layer
        if not isinstance(shape.kernels, TorchKernels):
            from trimtab.kernels import native_per_layer

            self.ops = native_per_layer
        self.ops.prepare(shape.kernels)

    def open(self, slot: int) -> None:
        t = self.tables
        t.start[slot] = t.done[slot] = 0
        t.kept_count[slot] = 0
        self._held[slot] = {name: [] for name in self.pools}
        self._dropped[slot] = 0

    def close(self, slot: int) -> None:
        for name, pages in self._held.pop(slot).items():
            self.pools[name].free(pages)

    def reserve(self, slot: int, rows: int, coding: bool, notes: bool = False) -> bool:
        """Room for `rows` rows in all; with `coding` for their codes and for all rows that may be kept; with
        `notes` for the policy's notes. False, and nothing changed, if there is none."""
        held, blocks = self._held[slot], -(-rows // PAGE)
        wanted = {"full": blocks - self._dropped[slot], "notes": int(notes)}
        if coding and "coded" in held:
            wanted["coded"] = blocks
            # Those given back when a text named fewer are not asked for again.
            if "kept" in held and not held["coded"]:
                wanted["kept"] = self.shape.num_layers * self.kept_most
        taken: dict[str, list[int]] = {}
        for name, count in wanted.items():
            if name in held and count > len(held[name]):
                pages = self.pools[name].alloc_many(count - len(held[name]))
                if pages is None:
                    for other, given in taken.items():
                        self.pools[other].free(given)
                    return False
                taken[name] = pages
        for name, pages in taken.items():
            first = len(held[name]) + (self._dropped[slot] if name == "full" else 0)
            held[name] += pages
            if name in ("full", "coded"):
                table = getattr(self.tables, name)
                table[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return True

    def note(self, slot: int, dtype: torch.dtype) -> Tensor | None:
        """The flat memory for a text's notes, if it has any."""
        pages = self._held[slot].get("notes")
        if not pages:
            return None
        size = self.pools["notes"].page_bytes
        return self.arena.bytes[pages[0] * size : (pages[0] + 1) * size].view(dtype)

    def drop_note(self, slot: int) -> None:
        self.pools["notes"].free(self._held[slot]["notes"])
        self._held[slot]["notes"] = []

    def prepare(self, rows: StepRows) -> None:
        """Once a step: which rows are new, and angles for all positions there may be."""
        t = self.tables
        t.spans, t.mask = rows.spans, rows.mask
        if not self._rope_on_read:
            return
        t.new_cos, t.new_sin = (None, None) if rows.mask is None else (rows.cos, rows.sin)
        end = max(s.length + b - a for s, (a, b) in zip(rows.sequences, rows.bounds, strict=True))
        if t.cos is None or end > t.cos.shape[0] * PAGE:
            blocks = max(16, 1 << (-(-end // PAGE) - 1).bit_length())
            cos, sin = self.shape.rotary.cos_sin(torch.arange(blocks * PAGE))
            t.cos, t.sin = (
                x.view(blocks, PAGE, -1).transpose(1, 2).contiguous().to(self.shape.device)
                for x in (cos, sin)
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.tables.layer = layer
        self.ops.write(self.shape.kernels, self.tables, k, v)
        return self.ops.attend(self.shape.kernels, self.tables, q)

    def arrange(self, slot: int, held: int, order: Seq[int]) -> None:
        """Make new rows `order`, counted from the `held` committed ones, the first new ones."""
        s, t = self.shape, self.tables
        source, target = torch.tensor(order) + held, torch.arange(len(order)) + held
        for layer in range(s.num_layers):
            k, v = reference_per_layer.get_full(t, slot, layer, source)
            reference_per_layer.put_full(t, slot, layer, target, k, v)

    def code(self, slot: int, end: int, kept: list[list[int]] | None = None) -> int:
        """Code rows up to `end`, layer l's rows `kept[l]` among them excepted; returns the bytes coded."""
        t, held = self.tables, self._held[slot]
        first = int(t.done[slot])
        for layer, tokens in enumerate(kept or ()):
            count = int(t.kept_count[slot, layer])
            assert count + len(tokens) <= self.kept_most
            for i, token in enumerate(tokens, count):
                t.kept_at[slot, layer, i] = token
                t.kept_page[slot, layer, i] = held["kept"][layer * self.kept_most + i]
            t.kept_count[slot, layer] = count + len(tokens)
        self.ops.code(self.shape.kernels, t, slot, range(first, end))
        t.done[slot] = end
        drop = end // PAGE - self._dropped[slot]
        self.pools["full"].free(held["full"][:drop])
        del held["full"][:drop]
        self._dropped[slot] += drop
        return (end - first) * self.shape.token_bytes

    def settle_kept(self, slot: int) -> None:
        """No more rows will be kept: give back the room for them."""
        held, used = self._held[slot]["kept"], set()
        for layer, count in enumerate(self.tables.kept_count[slot].tolist()):
            used |= set(self.tables.kept_page[slot, layer, :count].tolist())
        self.pools["kept"].free([page for page in held if page not in used])
        held[:] = [page for page in held if page in used]

    @property
    def bytes_used(self) -> int:
        return sum(pool.bytes_used for pool in self.pools.values())

    def held(self, slot: int) -> int:
        return sum(len(pages) * self.pools[name].page_bytes for name, pages in self._held[slot].items())

    def read(self, slot: int, length: int) -> int:
        """Bytes that attention over `length` rows reads."""
        t, done = self.tables, int(self.tables.done[slot])
        kept = int(t.kept_count[slot].sum())
        return (
            -(-done // PAGE) * t.coded_block + (length - done) * self.shape.token_bytes + kept * t.row_bytes
        )

    def check(self) -> None:
        self.arena.check()
        for name, pool in self.pools.items():
            held = [page for pages in self._held.values() for page in pages[name]]
            assert len(set(held)) == len(held) == pool.used, f"pages of {name} lost or held twice"


@dataclass(eq=False)
class PerLayerSequence(Sequence):
    notes: dict[int, Tensor] = field(default_factory=dict)  # of the step under way, layer by layer


class PerLayerCache(KVCache):
    """A policy on `PerLayerRows`. Derived ones make the rows, and may name tokens to keep in full."""

    chunks_generated = False
    alone_because: ClassVar[str] = "it codes all heads of a layer together, and rows are dropped head by head"

    def __init__(self, shape: KVShape, options: Any, memory_bytes: int) -> None:
        super().__init__(shape, options, memory_bytes)
        self.rows = self.make_rows(memory_bytes)

    @abstractmethod
    def make_rows(self, memory_bytes: int) -> PerLayerRows:
        """The arena of this method's form."""

    def kept(self, sequence: PerLayerSequence, first: int) -> list[list[int]] | None:
        """Of tokens `first` to `sequence.length`, about to be coded: for each layer those to keep in full."""
        return None

    @staticmethod
    def model_problems(config: ModelConfig) -> list[str]:
        found = []
        if any(config.sliding_windows):
            found.append("the model's own sliding-window layers already forget; use cache=full")
        if config.rope.kind == "dynamic":
            found.append(
                "dynamic rope scaling changes every angle as a text grows, and keys are turned when they "
                "are read; use kivi"
            )
        return found

    def new_sequence(self, slot: int, prompt_length: int) -> PerLayerSequence:
        self.rows.open(slot)
        return PerLayerSequence(slot, prompt_length)

    def release(self, sequence: Sequence) -> None:
        self.rows.close(sequence.slot)

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Also the room that coding at the commit will need, so that a commit cannot fail."""
        end = sequence.length + count
        return self.rows.reserve(sequence.slot, end, coding=end >= sequence.prompt_length)

    def begin(self, rows: StepRows) -> None:
        self.rows.prepare(rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        self.shape.kernels.rotate(q, rows.cos, rows.sin)
        return self.rows.attend(layer, q, k, v)

    def arrange(self, rows: StepRows, span: int, order: Seq[int]) -> None:
        self.rows.arrange(rows.sequences[span].slot, rows.sequences[span].length, order)

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        super().commit(rows, kept)
        t = self.rows.tables
        for sequence in rows.sequences:
            assert isinstance(sequence, PerLayerSequence)
            slot, length = sequence.slot, sequence.length
            first = int(t.done[slot])
            if t.codec is not None and length >= sequence.prompt_length and length > first:
                self.bytes_moved += self.rows.code(slot, length, self.kept(sequence, first))
            t.start[slot] = length

    @property
    def pools(self) -> dict[str, PagePool]:
        return self.rows.pools

    @property
    def bytes_capacity(self) -> int:
        return self.rows.arena.total

    @property
    def bytes_held(self) -> int:
        return self.rows.bytes_used

    def held_by(self, sequence: Sequence) -> int:
        return self.rows.held(sequence.slot)

    def read_per_step(self, sequence: Sequence) -> int:
        return self.rows.read(sequence.slot, sequence.length)

    def check(self) -> None:
        self.rows.check()
